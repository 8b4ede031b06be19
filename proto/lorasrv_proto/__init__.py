"""The wire contract of lorasrv: `.proto` files and the code generated from them. Knows nothing of server or client."""
