"""What is refused before a model is loaded, and what the machine decides."""

import socket
from pathlib import Path

import pytest
import torch
from lorasrv.config import ServeConfig
from lorasrv.errors import ConfigError, ModelLoadError
from lorasrv.rpc import backend
from lorasrv.rpc.app import serve


def test_a_taken_port_is_refused_before_the_base_is_loaded(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}"):
            serve(ServeConfig(base=str(tmp_path), port=port))


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError):
        backend.Backend.load(ServeConfig(base=str(tmp_path)))


def test_cuda_where_there_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="CUDA"):
        backend.Backend.load(ServeConfig(device="cuda"))
