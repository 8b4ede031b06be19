"""`lorasrv train --publish`: finished adapters go into a running server, each under its id as a new version.

What the server would refuse in the end, it is asked before the first step, as far as it can tell by then.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lorasrv_adapters.errors import AdapterError
from lorasrv_client import Client, ClientError
from lorasrv_client.errors import AdapterNotFoundError, InvalidArgumentError, NotFoundError, PermissionDeniedError
from lorasrv_client.types import ServerInfo

from lorasrv.cli.check import ServedBase, examine, read_base
from lorasrv.cli.console import print_error, say
from lorasrv.cli.exit_codes import ExitCode, exit_code_for
from lorasrv.errors import ConfigError, LorasrvError
from lorasrv.train.config import JobConfig, TrainConfig
from lorasrv.train.observer import RunObserver, RunStart

_PROBE_SECONDS = 10.0
# what no folder is called: whether the server may read from there shows before there is anything to read
_NOTHING_YET = ".not-trained-yet"


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """What became of an adapter at the server.

    Attributes:
        adapter_id: it answers to.
        digest: of the version; empty if there is none.
        replaced_digest: of the version before; empty if there was none.
        error: why it is not served; None if it is.
    """

    adapter_id: str
    digest: str = ""
    replaced_digest: str = ""
    error: Exception | None = None

    def summary(self) -> dict[str, object]:
        """For a report in JSON."""
        return {
            "adapter_id": self.adapter_id,
            "digest": self.digest or None,
            "replaced_digest": self.replaced_digest or None,
            "error": None if self.error is None else str(self.error),
        }


class Publisher(RunObserver):
    """Publishes the adapters of one run.

    Attributes:
        server: HOST:PORT.
    """

    def __init__(self, server: str, config: TrainConfig) -> None:
        """Publishes what this configuration trains; asks nothing yet."""
        self.server = server
        self._base = config.run.base
        jobs = config.jobs
        self._jobs = {name if len(jobs) > 1 else job.out.name: job for name, job in jobs.items()}
        self._ids = dict(zip(jobs, self._jobs, strict=True))
        self._base_digest = ""

    def probe(self) -> None:
        """Asks the server whether it is there and would take what this run is to write.

        Raises:
            ClientError: there is no server, or it does not talk to us.
            ConfigError: it would refuse an adapter; lists every reason.
        """
        with Client(self.server) as client:
            info = client.server_info(timeout_seconds=_PROBE_SECONDS)
            self._base_digest = info.base_digest
            reasons = [
                f"{self.server} would not take {adapter_id}: {reason}"
                for adapter_id, job in self._jobs.items()
                for reason in _reasons(client, info, adapter_id, job)
            ]
        if reasons:
            raise ConfigError(reasons)

    def run_started(self, start: RunStart) -> None:
        """Compares the bases.

        Raises:
            ConfigError: the server's is another one.
        """
        if start.base_digest != self._base_digest:
            raise ConfigError(
                [
                    f"{self.server} serves a base with digest {self._base_digest[:12]}, this run trains on one with "
                    f"{start.base_digest[:12]}, and no adapter fits both; train on the server's, or leave out publish"
                ]
            )

    def publish(self, folders: Mapping[str, Path]) -> dict[str, Publication]:
        """Checks every job's finished folder as `lorasrv check` does, and has the server load those that pass."""
        try:
            served = read_base(self._base, "auto")
        except (LorasrvError, OSError) as error:
            return {name: Publication(adapter_id=self._ids[name], error=error) for name in folders}
        found = {}
        with Client(self.server) as client:
            for name, folder in folders.items():
                found[name] = self._publish(client, self._ids[name], folder, served)
        return found

    def show(self, publications: Mapping[str, Publication], folders: Mapping[str, Path]) -> ExitCode:
        """Says what is served now and what is not; returns how the command ends."""
        code = ExitCode.OK
        for name, publication in publications.items():
            adapter_id = publication.adapter_id
            if publication.error is None:
                before = publication.replaced_digest[:12]
                place = f" in the place of {before}, on which running requests finish" if before else ""
                say(f"published {adapter_id}@{publication.digest[:12]} at {self.server}{place}")
                continue
            print_error(publication.error)
            say(f"{adapter_id} is not published; what was trained is in {folders[name]}")
            say(f"to publish it: lorasrv adapters load --server {self.server} --replace {adapter_id}={folders[name]}")
            if code is ExitCode.OK:
                code = exit_code_for(publication.error) or ExitCode.FAILURE
        return code

    def _publish(self, client: Client, adapter_id: str, folder: Path, served: ServedBase) -> Publication:
        try:
            digest = str(examine(folder, served)["digest"])
            before = _digest_now(client, adapter_id)
            adapter = client.load_adapter(adapter_id, str(folder), replace=True, expected_digest=digest)
        except (AdapterError, ClientError, OSError) as error:
            return Publication(adapter_id=adapter_id, error=error)
        return Publication(
            adapter_id=adapter_id, digest=adapter.digest, replaced_digest=before if before != adapter.digest else ""
        )


def _reasons(client: Client, info: ServerInfo, adapter_id: str, job: JobConfig) -> Iterator[str]:
    highest = max([job.rank, *dict(job.rank_pattern).values()])
    written = 2 * highest if job.initialization == "pissa" else highest
    if written > info.limits.max_rank:
        yield f"its rank is {written}, and the server's max_rank {info.limits.max_rank}"
    try:
        client.load_adapter(adapter_id, str(job.out / _NOTHING_YET), replace=True, timeout_seconds=_PROBE_SECONDS)
    except NotFoundError:
        # allowed there, and of course not found
        pass
    except (InvalidArgumentError, PermissionDeniedError) as error:
        yield str(error)


def _digest_now(client: Client, adapter_id: str) -> str:
    try:
        return client.get_adapter(adapter_id).digest
    except AdapterNotFoundError:
        return ""
