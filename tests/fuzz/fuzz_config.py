"""The config parser under atheris: `make fuzz`."""

import atheris
import atheris_driver

with atheris.instrument_imports(include=["lorasrv_adapters"]):
    from config_property import SEEDS, check_config

atheris_driver.fuzz(check_config, SEEDS)
