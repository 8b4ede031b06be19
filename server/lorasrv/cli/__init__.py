"""The `lorasrv` command: parses into frozen configuration and calls. What a command does is in other packages."""
