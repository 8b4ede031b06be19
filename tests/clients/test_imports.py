"""What importing the client brings in."""

import subprocess
import sys


def test_importing_the_client_loads_neither_torch_nor_the_server(tmp_path):
    program = (
        f"import sys; sys.path[:0] = {sys.path!r}; import lorasrv_client, lorasrv_client.types, lorasrv_client.errors; "
        "heavy = {'torch', 'numpy', 'lorasrv', 'lorasrv_adapters', 'lorasrv_kernels', 'yaml', 'rich'}; "
        "print(sorted(heavy & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("[]\n", "")
