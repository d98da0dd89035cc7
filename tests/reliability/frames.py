"""`python -m tests.reliability.frames`: mutated frames are refused by the codec's own error,
or are messages (R23).
"""

from __future__ import annotations

import argparse
import random
import sys
import time

from achilles.core import protocol as p
from achilles.errors import ProtocolError
from tests.unit.core.messages import WIRE


def main() -> int:
    """Decode so many; 1 if another exception escapes, or a message is no message."""
    parser = argparse.ArgumentParser(prog="python -m tests.reliability.frames")
    parser.add_argument("--frames", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    stream = random.Random(options.seed)
    samples = [
        [bytes(frame) for frame in p.encode(p.Header(b"t" * 16, 1, 0), message)] for message in WIRE
    ]
    refused = accepted = 0
    began = time.monotonic()
    for at in range(options.frames):
        frames = mutate(stream, samples[at % len(samples)], samples)
        try:
            _, message = p.decode(frames)
        except ProtocolError:
            refused += 1
        except BaseException as error:
            print(f"FAILED: {error!r} of {frames!r}", file=sys.stderr)
            print(f"figure: {at} frames, then {type(error).__name__} escaped (seed {options.seed})")
            return 1
        else:
            accepted += 1
            if type(message) not in _KINDS:
                print(f"figure: {message!r} is no message")
                return 1
    rate = options.frames / (time.monotonic() - began)
    print(
        f"figure: {options.frames} mutated messages, {refused} refused, {accepted} still valid, 0 exceptions escaped "
        f"({rate:.0f} a second)"
    )
    return 0


_KINDS = {type(message) for message in WIRE}


def mutate(stream: random.Random, frames: list[bytes], samples: list[list[bytes]]) -> list[bytes]:
    """One to three changes: of bits, bytes, lengths, order, or by parts of another message."""
    frames = list(frames)
    for _ in range(stream.randint(1, 3)):
        which = stream.randrange(len(frames)) if frames else -1
        if which < 0:
            return frames
        data = bytearray(frames[which])
        at = stream.randrange(len(data) + 1)
        match stream.randrange(7):
            case 0 if data:
                data[at % len(data)] ^= 1 << stream.randrange(8)
            case 1:
                data[at:at] = stream.randbytes(stream.randint(1, 9))
            case 2:
                del data[at:]
            case 3:
                other = stream.choice(stream.choice(samples))
                data[at:] = other[stream.randrange(len(other) + 1) :]
            case 4:
                frames.insert(which, stream.randbytes(stream.randint(0, 40)))
            case 5:
                del frames[which]
                continue
            case _:
                data[at : at + 4] = stream.choice((b"\xff" * 4, b"\x80" * 4, bytes(4), b"\xdf" * 4))
        frames[which] = bytes(data)
    return frames


if __name__ == "__main__":
    sys.exit(main())
