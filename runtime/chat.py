"""Chat templates: from messages to the prompt that a model was trained on.

A template comes with the checkpoint, so it is a stranger's code: it runs in Jinja's sandbox, on plain values only. The
environment offers what templates expect of Hugging Face's (block trimming, loop controls, `tojson` without HTML escapes,
`raise_exception`, `strftime_now`, the `generation` tag).
"""

from __future__ import annotations

import json
from datetime import datetime
from functools import lru_cache

from fusec.errors import UserError

ROLE_HINT = 'a list such as [{"role": "user", "content": "Hello"}]'


def render_chat(template: str, messages, *, add_generation_prompt=True, tools=None, **variables) -> str:
    """The prompt for `messages`, each a dict with `role` and usually `content`.

    add_generation_prompt: end where the assistant's answer begins.  tools: JSON schemas of functions, for templates that know
    them.  variables: what else the template reads: bos_token, eos_token, enable_thinking, …
    Raises UserError if the messages are malformed, or the template is, or it refuses them.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise UserError("there are no chat messages", expected=ROLE_HINT, found=f"{messages!r:.60}")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UserError("a chat message is malformed", expected=ROLE_HINT, found=f"{message!r:.60}")
    try:
        # through JSON: a template never holds an object that has methods of its own
        values = json.loads(json.dumps({"messages": messages, "tools": tools, **variables}))
    except (TypeError, ValueError) as error:
        raise UserError("chat messages must be plain JSON values", found=str(error)) from None
    try:
        return _compile(template).render(**values, add_generation_prompt=add_generation_prompt)
    except Exception as error:  # besides Jinja's own errors: any TypeError or KeyError of the template's expressions
        line = getattr(error, "lineno", None)
        where = f", line {line}" if line else ""
        raise UserError(
            "the model's chat template failed",
            found=f"{type(error).__name__}{where}: {error}",
            hint="check the messages' roles and their order, or send the prompt without a template (--raw)",
        ) from None


@lru_cache(maxsize=8)
def _compile(template):
    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}…{% endgeneration %}` marks the assistant's words for training; here it is its body."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message):
        raise TemplateError(message)

    def strftime_now(layout):
        return datetime.now().strftime(layout)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = to_json
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    return environment.from_string(template)
