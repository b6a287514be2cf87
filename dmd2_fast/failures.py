"""How a rank ends when something is wrong: one message, from rank 0, and no stack trace for what a user can mend."""

from __future__ import annotations

import math
import os
import sys
import time

from .errors import UserError, write_failure
from .rendezvous import is_first_on_node, tell
from .stopping import EXIT_STOPPED, StopSignals

EXIT_DIVERGED, EXIT_USER_ERROR, EXIT_LOST = 1, 2, 3
PATIENCE_SECONDS = 20.0
"""How long a rank waits for the launcher to end it, as it does when another rank has reported."""
_LOST_PEER = (
    "closed by peer", "reset by peer", "pair closure", "Broken pipe", "remote process exited", "Timed out waiting",
    "failed to recv",
)  # fmt: skip


class DivergedError(RuntimeError):
    """The run met non-finite gradients too many times in a row."""


def diagnosis(network: str, iteration: int, num_in_a_row: int, num_skipped: int, means: dict[str, float]) -> str:
    """What to tell about a run that stopped, from the means of its metrics since the last log line."""
    broken = sorted(name for name, value in means.items() if not math.isfinite(value))
    return (
        f"stopped at iteration {iteration}: {num_in_a_row} updates in a row of the {network} met a non-finite loss or "
        f"gradient and were skipped ({num_skipped} in all).\n"
        f"not finite since the last log line: {', '.join(broken) or 'no loss, only gradients'}.\n"
        f"means since the last log line: {means}\n"
        "The state is saved; the weights are those before the first skipped update. What helps: a lower learning "
        "rate or gradient_clipping, a smaller adversarial.generator_weight, a larger fake_score.ttur_ratio; "
        "look at metrics.jsonl for what grew before."
    )


def message_of(error: BaseException) -> str | None:
    """What to tell the user; None where the stack trace is wanted."""
    return str(error) if isinstance(error, (UserError, DivergedError)) else write_failure(error)


def exit_code(error: BaseException, stop: StopSignals) -> int | None:
    """Report an error and return the exit code, or None to let the error itself through with its stack trace.

    Most errors meet every rank: the first of each node reports and leaves, and the node's launcher ends the others.
    What another rank alone met, it reports itself when nobody has ended it for a while; so does one whose collective
    broke because a rank left. Ranks that have not met yet are told, so that none waits for this one.
    """
    message, rank, speaks = message_of(error), os.environ.get("RANK", "0"), is_first_on_node()
    code = EXIT_DIVERGED if isinstance(error, DivergedError) else EXIT_USER_ERROR
    lost_peer = isinstance(error, RuntimeError) and any(words in str(error) for words in _LOST_PEER)
    if message is not None and speaks:
        _say(message, rank)
    if message is not None or not lost_peer:
        tell(message or f"{type(error).__name__}: {error}")
    if message is None and not lost_peer:
        return None
    if message is not None and speaks:
        return code
    if stop.requested:  # the launcher has asked this rank to end already
        return code if message is not None else EXIT_STOPPED
    stop.default()
    time.sleep(PATIENCE_SECONDS if speaks else 2 * PATIENCE_SECONDS)
    if message is None:
        first = (str(error).splitlines() or [""])[0]
        _say(
            "the connection to another rank is lost: it has ended, or its node, or the network between. Its own output "
            f"says why; the same command goes on from the last checkpoint. ({first})",
            rank,
        )
        return EXIT_LOST
    _say(message, rank)
    return code


def _say(message: str, rank: str) -> None:
    # One write: print's newline comes after it, and another rank's message between the two.
    sys.stderr.write(f"error: {message}\n" if rank == "0" else f"error on rank {rank}: {message}\n")
    sys.stderr.flush()
