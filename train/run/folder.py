"""The folder of a run: created once, locked while in use, resumed after a kill."""

import contextlib
import datetime
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, Self

from train.run import command
from train.run import log as log_file
from train.run.devices import print_compiling
from train.run.environment import WriteScalars, environment, event_writer
from train.run.output import Output

try:
    import fcntl
except ImportError:  # on Windows
    fcntl: Any = None

FORMAT = 2  # of a run's folder. 1, which was not written down: other optimizer states


def new_folder(config: Output, prefix: str) -> Path:
    """Makes the folder of a command that is not resumed: NAME, or PREFIX-DATE-TIME.

    Raises:
        ValueError: it exists, and config.overwrite is False.
    """
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = config.out / (config.name or f"{prefix}-{now}")
    if folder.exists() and not config.overwrite:
        raise ValueError(f"name: {folder} exists; choose another or pass --overwrite")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class Run:
    """A run of several seeds, which can be killed at any moment and resumed.

    A context manager: creates the folder or opens that of an earlier run with the same
    settings, and keeps other processes out of it.

        with Run(config, script="cifar10", name="adamw-30", may_change=()) as run:
            for seed in run.seeds_left:
                with run.checkpoints(seed) as checkpoints:
                    ...  # restore a state, train
                    run.log("epoch", seed=seed, epoch=1, step=391, loss=0.5)
                run.log("end", seed=seed, accuracy=94.1)

    Args:
        config: an `Output`, written to config.json.
        script: the command whose run it is; a run of another one is never touched.
        name: of the folder where config.name is None.
        may_change: settings that may differ when the run is resumed, besides those of
            `Output`.
        seeds: of the runs; None: config.seeds of them, the first being config.seed.
        **identity: what else must be the same, such as a hash of the data.

    Attributes:
        folder: config.json, metrics.jsonl, checkpoints/ and tensorboard/ are in it.
        seeds: that are asked for.
        seeds_left: those that are not finished.

    Raises:
        ValueError: by `with`. The folder holds something else, or a run with other
            settings, of an earlier version, or of a process that is still running.
    """

    def __init__(
        self,
        config: Any,
        *,
        script: str,
        name: str,
        may_change: tuple[str, ...],
        seeds: Sequence[int] | None = None,
        **identity: Any,
    ):
        self.config = config
        self.script = script
        self.name: str = config.name or name
        self.folder: Path = config.out / self.name
        self.may_change = may_change
        if seeds is None:
            seeds = range(config.seed, config.seed + config.seeds)
        self.seeds = seeds
        self.identity = identity
        self._resources = contextlib.ExitStack()

    @property
    def seeds_left(self) -> list[int]:
        return [seed for seed in self.seeds if not self.ended(seed)]

    def __enter__(self) -> Self:
        self._open()
        with contextlib.ExitStack() as resources:
            resources.enter_context(exclusive(self.folder))
            resources.enter_context(command.resumable())
            written = log_file.read_json(self.folder / "config.json").get("format", 1)
            if written != FORMAT and self.seeds_left:
                raise ValueError(
                    f"name: {self.folder} has an unfinished run of an earlier version "
                    f"(format {written}, now {FORMAT}), whose checkpoints cannot be "
                    "continued. Finish it with that version, choose another --name, or "
                    "pass --overwrite to remove it"
                )
            self._resources = resources.pop_all()
        self._print_what_follows()
        return self

    def _print_what_follows(self) -> None:
        """Seeds that are finished, and a line before the silence of compilation."""
        left, seeds = self.seeds_left, len(self.seeds)
        if 0 < len(left) < seeds:
            print(f"{seeds - len(left)} of {seeds} seeds are finished.")
        if left:
            print_compiling(str(self.folder))

    def __exit__(self, *exception: Any) -> None:
        self._resources.close()

    # the log

    def start(self, compile_seconds: float) -> log_file.Event:
        """Logs and returns the environment; warns if it is not that of the last start.

        Call it once per process, after compilation.
        """
        start = {"compile_seconds": compile_seconds} | environment()
        if earlier := self.lines("start"):
            keys = ("devices", "versions", "xla_flags")
            changed = [key for key in keys if start[key] != earlier[-1][key]]
            if changed:
                print(
                    f"Warning: this run started with other {', '.join(changed)}; "
                    "results will not be bit-identical."
                )
        return self.log("start", **start)

    def log(self, event: str, **values: Any) -> log_file.Event:
        """Appends an event to metrics.jsonl, which is on disk when this returns.

        Seeds are resumed and reported by two events: "epoch", with seed, epoch and
        step, and "end", with seed.
        """
        line = {"event": event} | values
        log_file.append_line(self.folder / "metrics.jsonl", line)
        return line

    def lines(
        self, event: str | None = None, seed: int | None = None
    ) -> list[log_file.Event]:
        """The events logged so far; None: those of all kinds, or of all seeds."""
        return log_file.read_events(self.folder, event, seed)

    def ended(self, seed: int) -> bool:
        """Whether a seed is finished."""
        return bool(self.lines("end", seed))

    def rewind(self, seed: int, step: int, epochs: int) -> None:
        """Drops what a seed logged after the checkpoint of `step`; see `rewind_log`."""
        if step:
            seed_of = f"Seed {seed}: going" if len(self.seeds) > 1 else "Going"
            print(f"{seed_of} on from step {step}.", flush=True)
        log_file.rewind_log(self.folder / "metrics.jsonl", seed, step, epochs)

    def diverged(self, seed: int, step: int, **values: float) -> NoReturn:
        """Logs that a seed has diverged, and ends the run.

        Args:
            seed: that has diverged.
            step: at which.
            **values: loss, learning_rate and what else explains it.

        Raises:
            FloatingPointError: always.
        """
        self.log("diverged", seed=seed, step=step, **values)
        shown = ", ".join(f"{k.replace('_', ' ')} {v:.3g}" for k, v in values.items())
        raise FloatingPointError(
            f"seed {seed} diverged at step {step}: {shown}. Finished epochs: "
            f"{len(self.lines('epoch', seed))}. Checkpoints: "
            f"{self.checkpoint_folder(seed)}"
        )

    # the rest of the folder

    def checkpoint_folder(self, seed: int, *stage: str) -> Path:
        return self.folder.joinpath("checkpoints", str(seed), *stage)

    def checkpoints(self, seed: int, *stage: str) -> Any:
        """Opens the checkpoints of a seed, or of a stage of it: a context manager."""
        from train.run import checkpoint

        return checkpoint.open_folder(self.checkpoint_folder(seed, *stage))

    def events(
        self, seed: int, step: int
    ) -> contextlib.AbstractContextManager[WriteScalars]:
        """Yields `write(step, scalars)`, which does nothing without --tensorboard.

        Args:
            seed: of the run.
            step: from which it starts or resumes.
        """
        folder = self.folder / "tensorboard" / str(seed)
        return event_writer(folder if self.config.tensorboard else None, step)

    # opening

    def _open(self) -> None:
        """Creates the folder with its config.json, or checks that of an earlier run."""
        if Path(self.name).name != self.name or self.name == "..":
            raise ValueError(f"name must be that of a folder, got {self.name!r}")
        path = self.folder / "config.json"
        earlier = log_file.read_json(path)
        if self.folder.exists() and earlier.get("script") != self.script:
            if not self.folder.is_dir() or any(
                entry.suffix != ".tmp" for entry in self.folder.iterdir()
            ):
                raise ValueError(
                    f"name: {self.folder} exists and is not the folder of a run of "
                    f"train.{self.script}. Choose another --name"
                )
        if earlier and self.config.overwrite:
            with exclusive(self.folder):
                removed = self.folder.with_name(f".{self.name}.removed")
                shutil.rmtree(removed, ignore_errors=True)
                self.folder.rename(removed)  # first: half a run is not recognised
                shutil.rmtree(removed)
            earlier = {}
        settings = {"script": self.script} | vars(self.config) | self.identity
        settings = json.loads(json.dumps(settings, default=str))
        if earlier:
            self._check_settings(earlier, settings)
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        log_file.write_json(path, {"format": FORMAT} | settings | environment())

    def _check_settings(self, earlier: dict[str, Any], settings: dict[str, Any]):
        may_change = (*self.may_change, *vars(Output()))
        changed = [
            f"{key} = {earlier.get(key)!r}, now {value!r}"
            for key, value in settings.items()
            if key not in may_change and value != earlier.get(key)
        ]
        if changed:
            raise ValueError(
                f"name: {self.folder} has a run with {'; '.join(changed)}. Choose "
                "another --name, or pass --overwrite to remove it"
            )


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Locks a folder against other processes; a kill releases the lock.

    The folder itself is locked, so that no lock file is left behind. Without effect
    where the operating or the file system cannot lock a folder.

    Raises:
        ValueError: another process holds the lock.
    """
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"name: another process is using {folder}") from error
        except OSError:  # as on NFS, whose locks need a file
            pass
        yield
    finally:
        os.close(handle)
