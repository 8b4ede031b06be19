"""From a job's files to what it learns and what is held out. Knows configurations and formats; no adapter."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorasrv.errors import TrainingDataError
from lorasrv.model.tokenizer import Tokenizer
from lorasrv.train.config import JobConfig
from lorasrv.train.data.conversation import ChatTemplate
from lorasrv.train.data.examples import Example, Tally, encode_samples
from lorasrv.train.data.records import read_records
from lorasrv.train.data.samples import to_sample


@dataclass(frozen=True, slots=True, kw_only=True)
class JobData:
    """What one job learns from.

    Attributes:
        examples: to learn.
        held_out: to evaluate with.
        tally: of everything that was read to be learned or held out.
    """

    examples: Sequence[Example]
    held_out: Sequence[Example]
    tally: Tally


def read_jobs(jobs: Mapping[str, JobConfig], base: Path, *, max_tokens: int) -> dict[str, JobData]:
    """Read the data of every job.

    Args:
        jobs: by name.
        base: the folder with tokenizer and chat template.
        max_tokens: of an example.

    Raises:
        TrainingDataError: it cannot be learned from; lists what is wrong in every job.
    """
    tokenizer = Tokenizer(base)
    reasons: list[str] = []
    found = {}
    for name, job in jobs.items():
        try:
            found[name] = _read(job, tokenizer, base, max_tokens=max_tokens)
        except TrainingDataError as error:
            place = f"job {name}: " if len(jobs) > 1 else ""
            reasons += [place + reason for reason in error.reasons]
    if reasons:
        raise TrainingDataError(reasons)
    return found


def _read(job: JobConfig, tokenizer: Tokenizer, base: Path, *, max_tokens: int) -> JobData:
    own = None if job.chat_template is None else ChatTemplate(job.chat_template.read_text(encoding="utf-8"))
    template = own or ChatTemplate.from_folder(base)

    def encode(files: Sequence[Path]) -> tuple[list[Example], Tally]:
        samples = (to_sample(record, template) for file in files for record in read_records(file))
        return encode_samples(samples, tokenizer, max_tokens=max_tokens, over_long=job.over_long)

    examples, tally = encode(job.data)
    if job.eval_data:
        return JobData(examples=examples, held_out=encode(job.eval_data)[0], tally=tally)
    # the last ones: of running text, what comes after everything learned
    kept = min(round(len(examples) * job.eval_fraction), len(examples) - 1)
    cut = len(examples) - kept
    return JobData(examples=examples[:cut], held_out=examples[cut:], tally=tally)
