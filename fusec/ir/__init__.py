"""The graph IR: values and graphs, primitive ops, text form, verifier, interpreter."""
