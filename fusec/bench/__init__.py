"""`fusec bench`: how fast compiled programs run, against what the machine allows, measured in the same run."""
