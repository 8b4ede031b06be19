"""The `lorasrv` command: parses into frozen configuration and calls. What the commands do is in other packages."""
