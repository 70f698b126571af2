"""Predict frames with one or several models, in this process or in several, each with a GPU and a part of the frames.

The models of a process share what it decodes. Their probabilities and VA are averaged (`averaging`), as the
ensemble's are.
"""

from __future__ import annotations

import signal
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import numpy as np
import torch

from mtl_dist.data.frames import Seen
from mtl_dist.errors import InputError, StorageError
from mtl_dist.machine import num_cpus
from mtl_dist.objective.affect import PredictedRows
from mtl_dist.objective.metrics import Predictions, Targets
from mtl_dist.predicting.averaging import Cut, Summed, group_by_cut, load_all, mean_rows, sum_predictions
from mtl_dist.predicting.inputs import Frames
from mtl_dist.predicting.views import Views
from mtl_dist.processes import end_with_parent, spawn
from mtl_dist.runs.weights import Weights

_STOP_S = 5.0  # given to a process that is done, or told to end

Progress = Callable[[int], None]


class Task(NamedTuple):
    """What all processes work on."""

    models: tuple[Weights, ...]
    frames: Frames | Views
    device: str  # cpu or cuda
    batch: int  # images of a forward pass
    workers: int  # decoding threads of a process

    @property
    def num_passes(self) -> int:
        """How often every frame is decoded: once for every view, and every size that models were evaluated at."""
        return len(group_by_cut(self.models))


class Outcome(NamedTuple):
    """What was predicted, and what was noticed of the frames meanwhile."""

    predicted: PredictedRows
    seen: Seen


def predict_frames(task: Task, *, processes: int, progress: Progress) -> Outcome:
    """Predict all frames; rows in ascending order. `progress` is told of frames, each `task.num_passes` times.

    Raises `InputError` where frames or weights cannot be read, or a process was killed.
    """
    if processes == 1:
        return _joined([predict_part(task, part=0, num_parts=1, progress=progress)])
    running: dict[Connection, tuple[int, BaseProcess]] = {}
    try:
        for part in range(processes):
            receiver, sender = spawn.Pipe(duplex=False)
            process = spawn.Process(target=_part_main, args=(sender, task, part, processes), daemon=True)
            process.start()
            sender.close()  # the process's own end alone: when it dies, the pipe ends
            running[receiver] = (part, process)
        outcomes = list(_results(dict(running), processes, progress))
        for _, process in running.values():
            process.join(_STOP_S)  # it is done: it ends by itself, and leaves its GPU in order
        return _joined(outcomes)
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.join(_STOP_S)
            if process.is_alive():  # Python joins it for ever at exit
                process.kill()


def predict_part(task: Task, *, part: int, num_parts: int, progress: Progress) -> Outcome:
    """Predict one part of the frames in this process, in the order of the frames."""
    device = torch.device("cpu")
    if task.device == "cuda":
        device = torch.device("cuda", part % torch.cuda.device_count())
        torch.cuda.set_device(device)
    groups = group_by_cut(task.models)
    parts, seen = [], Seen()
    for cut, models in groups.items():
        # Every pass through the same files sees the same.
        this_pass = Seen() if cut.view in {other.view for other in list(groups)[: len(parts)]} else seen
        which = {"part": part, "num_parts": num_parts, "seen": this_pass}
        parts.append(Summed(_predict_pass(models, task, cut, device, which, progress), len(models)))
    predicted, counts = mean_rows(parts)
    if (partial := predicted.rows[counts < len(task.models)]).size:
        for name in task.frames.names(partial):
            seen.note("one view", name)
    return Outcome(predicted, seen)


def _predict_pass(
    models: list[Weights], task: Task, cut: Cut, device: torch.device, which: dict[str, Any], progress: Progress
) -> PredictedRows:
    """Sum the predictions of models of one cut over one pass through the frames."""
    loaded, summed = load_all(models, device), []
    frames = task.frames.of[cut.view] if isinstance(task.frames, Views) else task.frames
    for batch in frames.batches(cut.size, batch=task.batch, workers=task.workers, **which):
        summed.append(sum_predictions(loaded, [batch], device))
        progress(int(batch.valid.sum()))
    return _concatenate(summed or [sum_predictions(loaded, [], device)])


def _part_main(sender: Connection, task: Task, part: int, num_parts: int) -> None:
    """Run in a process of its own: send ("progress", n) and at the end ("done", Outcome) or what went wrong."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the first process, which ends the others
    if task.device == "cpu":
        torch.set_num_threads(max(1, min(torch.get_num_threads(), num_cpus()) // num_parts))
    try:
        outcome = predict_part(
            task, part=part, num_parts=num_parts, progress=lambda count: sender.send(("progress", count))
        )
        sender.send(("done", outcome))
    except InputError as error:  # or a kind of it
        sender.send(("InputError", str(error)))
    except StorageError as error:
        sender.send(("StorageError", str(error)))
    except Exception:
        sender.send(("crash", traceback.format_exc()))


def _results(running: dict[Connection, tuple[int, BaseProcess]], processes: int, progress: Progress) -> Iterator:
    """Yield what each process predicted as it ends; raise what one of them raised."""
    while running:
        for receiver in wait(list(running)):
            part, process = running[receiver]
            try:
                kind, value = receiver.recv()
            except (EOFError, OSError):  # OSError: killed while it was sending
                process.join()
                raise _ended(part, processes, process.exitcode) from None
            if kind == "progress":
                progress(value)
            elif kind == "done":
                del running[receiver]
                yield value
            else:
                raise _failed(kind, value, part, processes)


def _ended(part: int, processes: int, status: int | None) -> InputError:
    how = f"was killed by signal {-status}" if status and status < 0 else f"ended with exit code {status}"
    return InputError(
        f"process {part + 1} of {processes} {how} before its part was predicted; where memory ran out, lower "
        "--batch, --workers or --processes"
    )


def _failed(kind: str, value: Any, part: int, processes: int) -> Exception:
    if kind == "crash":
        return RuntimeError(f"process {part + 1} of {processes} failed:\n{value}")
    return {"InputError": InputError, "StorageError": StorageError}[kind](value)


def _concatenate(parts: list[PredictedRows]) -> PredictedRows:
    rows = np.concatenate([part.rows for part in parts])
    predictions = Predictions(*(np.concatenate(column) for column in zip(*(part.predictions for part in parts))))
    return PredictedRows(
        rows, predictions, Targets(*(np.concatenate(column) for column in zip(*(part.targets for part in parts))))
    )


def _joined(parts: list[Outcome]) -> Outcome:
    joined, seen = _concatenate([part.predicted for part in parts]), Seen()
    for part in parts:
        seen.add(part.seen)
    by_row = np.argsort(joined.rows)
    predicted = PredictedRows(
        joined.rows[by_row],
        Predictions(*(array[by_row] for array in joined.predictions)),
        Targets(*(array[by_row] for array in joined.targets)),
    )
    return Outcome(predicted, seen)
