"""Where the configuration of a server comes from, and what is wrong with it."""

import argparse
from pathlib import Path

import pytest
from lorasrv.cli.environment import known_variables
from lorasrv.cli.layers import add_flags, resolve
from lorasrv.config import ConnectConfig, ServeConfig, is_loopback
from lorasrv.errors import ConfigError
from lorasrv.settings import settings_of


def configure(*argv, environ=None, file=None):
    parser = argparse.ArgumentParser()
    add_flags(parser, ServeConfig)
    return resolve(ServeConfig, flags=vars(parser.parse_args(argv)), environ=environ or {}, config_file=file)


@pytest.fixture
def yaml_file(tmp_path):
    def write(text):
        path = tmp_path / "lorasrv.yaml"
        path.write_text(text)
        return path

    return write


def reasons_of(call, *args, **kwargs):
    with pytest.raises(ConfigError) as caught:
        call(*args, **kwargs)
    return caught.value.reasons


def test_without_anything_the_defaults_hold():
    assert configure() == ServeConfig()


def test_flag_wins_over_environment_over_file_over_default(yaml_file):
    file = yaml_file("max_rank: 1\nmax_queue: 1\nmax_adapters: 1\n")
    environ = {"LORASRV_MAX_QUEUE": "2", "LORASRV_MAX_ADAPTERS": "2"}
    config = configure("--max-adapters", "3", environ=environ, file=file)
    assert (config.max_rank, config.max_queue, config.max_adapters) == (1, 2, 3)
    assert config.max_num_seqs == ServeConfig().max_num_seqs


VALUES = {
    "base": ("models/x", "models/x"),
    "adapters": ("a=/x", (("a", "/x"),)),
    "adapter_roots": ("/roots", (Path("/roots"),)),
    "allowed_repositories": ("org/name", ("org/name",)),
    "host": ("127.0.0.2", "127.0.0.2"),
    "port": ("1", 1),
    "metrics_port": ("0", 0),
    "insecure": ("yes", True),
    "device": ("cuda", "cuda"),
    "dtype": ("float32", "float32"),
    "quantize_base": ("off", "off"),
    "exact": ("on", "on"),
    "cpu_isa": ("avx2", "avx2"),
    "cuda_graphs": ("off", "off"),
    "max_model_len": ("100", 100),
    "max_num_seqs": ("5", 5),
    "max_batched_tokens": ("77", 77),
    "kv_bytes": ("512MiB", 512 * 1024**2),
    "adapter_bytes": ("1GB", 10**9),
    "max_rank": ("9", 9),
    "max_adapters": ("9", 9),
    "max_queue": ("9", 9),
    "host_cache_bytes": ("2GB", 2 * 10**9),
    "drain_timeout_seconds": ("2.5", 2.5),
    "log_level": ("debug", "debug"),
    "log_format": ("json", "json"),
}


@pytest.mark.parametrize("setting", settings_of(ServeConfig), ids=lambda setting: setting.key)
def test_every_setting_is_flag_key_and_variable(setting, yaml_file):
    text, expected = VALUES[setting.name]
    # a setting that needs another one to be valid
    extra = {"max_num_seqs": 5} if setting.name == "max_batched_tokens" else {}
    want = ServeConfig(**extra, **{setting.name: expected})
    others = [f"--max-num-seqs={number}" for number in extra.values()]
    flag = [text] if setting.positional else [setting.flag, text]
    assert configure(*others, *(["--insecure"] if setting.name == "insecure" else flag)) == want
    assert configure(*others, environ={setting.variable: text}) == want
    value = f"[{text}]" if setting.repeated else text
    assert configure(*others, file=yaml_file(f"{setting.key}: {value}\n")) == want
    assert configure(*others, file=yaml_file(f"{setting.key.replace('_', '-')}: {value}\n")) == want


def test_repeated_settings_take_lists_in_every_form(yaml_file):
    pairs = (("a", "/x"), ("b", "hf:org/b@main"))
    assert configure("--adapter", "a=/x", "--adapter", "b=hf:org/b@main").adapters == pairs
    assert configure(environ={"LORASRV_ADAPTER": "a=/x, b=hf:org/b@main"}).adapters == pairs
    assert configure(file=yaml_file("adapter: {a: /x, b: 'hf:org/b@main'}")).adapters == pairs
    assert configure(file=yaml_file("adapter: [a=/x, b=hf:org/b@main]")).adapters == pairs


def test_a_yaml_switch_word_is_a_choice_too(yaml_file):
    assert configure(file=yaml_file("exact: off")).exact == "off"
    assert configure(file=yaml_file("exact: on")).exact == "on"
    assert configure("--no-insecure", environ={"LORASRV_INSECURE": "1"}).insecure is False


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("10B", 10),
        ("1KiB", 1024),
        ("1kb", 1000),
        ("1.5GiB", 3 * 2**29),
        ("2TiB", 2 * 2**40),
        (" 3 MB ", 3 * 10**6),
    ],
)
def test_sizes(text, size):
    assert configure(environ={"LORASRV_KV_BYTES": text}).kv_bytes == size


@pytest.mark.parametrize("text", ["1.5", "1.5B", "MiB", "-1", "1XB", "1 2", "1K"])
def test_what_is_no_size_is_refused(text):
    (reason,) = reasons_of(configure, environ={"LORASRV_KV_BYTES": text})
    assert reason.startswith("environment: LORASRV_KV_BYTES: expected a size in bytes")


def test_unknown_names_are_errors_with_a_suggestion(yaml_file):
    reasons = reasons_of(
        configure, environ={"LORASRV_MAXRANK": "1", "LORASRV_XYZZY": "1"}, file=yaml_file("max_adaptors: 3\n7: 1\n")
    )
    assert [reason.split(": ", 1)[1] for reason in reasons] == [
        "unknown key max_adaptors; did you mean max_adapters?",
        "unknown key 7",
        "unknown variable LORASRV_MAXRANK; did you mean LORASRV_MAX_RANK?",
        "unknown variable LORASRV_XYZZY",
    ]


def test_values_of_the_wrong_kind_are_all_named(yaml_file):
    file = yaml_file("max_rank: [1]\nport: yes\nadapter: 3\ndevice: tpu\ndrain_timeout: soon\nhost: 1\n")
    reasons = reasons_of(configure, environ={"LORASRV_ADAPTER": "a"}, file=file)
    assert [reason.removeprefix(f"{file}: ") for reason in reasons] == [
        "max_rank: expected a whole number, got [1]",
        "port: expected a whole number, got True",
        "adapter: expected a list, got 3",
        "device: expected one of auto, cpu, cuda, got 'tpu'",
        "drain_timeout: expected a number of seconds, got 'soon'",
        "host: expected text, got 1",
        "environment: LORASRV_ADAPTER: expected ID=SOURCE, got 'a'",
    ]


@pytest.mark.parametrize(
    ("content", "reason"),
    [("a: [", "not YAML"), ("- a\n- b\n", "expected keys and values, got list"), ("\x00", "not YAML")],
)
def test_a_file_that_cannot_be_used_is_named(yaml_file, content, reason):
    (found,) = reasons_of(configure, file=yaml_file(content))
    assert reason in found


def test_a_missing_file_is_named(tmp_path):
    (reason,) = reasons_of(configure, file=tmp_path / "none.yaml")
    assert reason == f"{tmp_path}/none.yaml: cannot be read: No such file or directory"


def test_an_empty_file_an_empty_variable_and_a_null_change_nothing(yaml_file):
    assert configure(environ={"LORASRV_PORT": ""}, file=yaml_file("")) == ServeConfig()
    assert configure(file=yaml_file("kv_bytes:\n")) == ServeConfig()


def test_what_kubernetes_sets_for_a_service_of_this_name_is_not_ours():
    links = {
        "LORASRV_SERVICE_HOST": "10.0.0.1",
        "LORASRV_SERVICE_PORT_GRPC": "50051",
        "LORASRV_PORT": "tcp://10.0.0.1:50051",
        "LORASRV_PORT_50051_TCP_ADDR": "10.0.0.1",
    }
    assert configure(environ=links) == ServeConfig()


def test_values_that_cannot_work_are_listed_together():
    reasons = reasons_of(
        ServeConfig,
        host="0.0.0.0",
        port=-1,
        metrics_port=70000,
        max_rank=0,
        max_num_seqs=8,
        max_batched_tokens=4,
        kv_bytes=0,
        drain_timeout_seconds=-1.0,
        adapters=(("a", "/x"), ("b", "/y"), ("a", "/z")),
    )
    assert reasons == (
        "port is -1: it must be from 0 to 65535",
        "metrics_port is 70000: it must be from 0 to 65535",
        "kv_bytes is 0: it must be at least 1",
        "max_rank is 0: it must be at least 1",
        "drain_timeout_seconds is -1.0: it must be at least 0",
        "max_batched_tokens is 4, less than max_num_seqs 8: a step must hold one token of every running sequence",
        "host 0.0.0.0 can be reached from other machines: add insecure to serve it without encryption",
        "adapter a is given 2 times: ids must differ",
    )


def test_ports_must_differ_unless_free_or_off():
    assert reasons_of(ServeConfig, port=5, metrics_port=5) == ("port and metrics_port are both 5: they must differ",)
    assert ServeConfig(port=0, metrics_port=0).port == 0


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost"])
def test_loopback_needs_no_insecure(host):
    assert is_loopback(host)
    assert ServeConfig(host=host).host == host


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "example.org"])
def test_other_addresses_need_insecure(host):
    assert not is_loopback(host)
    assert ServeConfig(host=host, insecure=True).host == host


def test_folders_given_as_adapters_are_roots_too(tmp_path):
    config = ServeConfig(
        adapters=(("a", str(tmp_path / "a")), ("b", "hf:org/b"), ("c", str(tmp_path))), adapter_roots=(tmp_path,)
    )
    assert config.allowed_roots == (tmp_path, tmp_path / "a")


def test_connect_timeout_must_be_positive():
    assert reasons_of(ConnectConfig, timeout_seconds=0.0) == ("timeout is 0.0: it must be above 0",)


def test_known_variables_are_those_of_all_commands():
    assert {"LORASRV_CONFIG", "LORASRV_SERVER", "LORASRV_TIMEOUT", "LORASRV_MAX_RANK"} <= known_variables()
