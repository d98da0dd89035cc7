"""The measurements of many sessions, small: they run, check their results,
and say what is missed.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from achilles.core import protocol as p
from benchmarks import fakes, scale
from benchmarks.crowd import Crowd
from benchmarks.fakes import ALONE, TENS, Answerer, Asker, WrongResult, call
from benchmarks.scale import TINY, Found, main
from benchmarks.stats import Summary
from benchmarks.tables import with_block

ROOT = Path(__file__).parents[3]


def flat(value: float, *sizes: float) -> dict[float, Summary]:
    return {size: Summary(value, value, value, 1) for size in sizes}


@pytest.fixture(scope="module")
def found() -> Found:
    return scale.measure(TINY)


def test_every_part_finds_figures(found: Found) -> None:
    """With real processes and sockets, over both transports."""
    text = scale.tables(found)
    assert "nan" not in text
    assert all(line.low > 0 for line in found.core.queue[TENS].values())
    for transport in (scale.IPC, scale.TCP):
        assert found.fleets[transport].rate[ALONE].keys() == set(TINY.fleet)
        assert found.bytes[transport].rate[1].low > 0
        assert f"### Real sessions over {transport}" in text
    for drawing in scale.charts(found).values():
        ElementTree.fromstring(drawing)


def test_the_page_has_a_place_for_the_tables() -> None:
    page = (ROOT / "docs" / "scaling.md").read_text("utf-8")
    assert "a new table" in with_block(page, "scale", "a new table")
    for name in ("queue.svg", "workers.svg", "sockets.svg"):
        assert f"(scaling/{name})" in page
        assert (ROOT / "docs" / "scaling" / name).exists()


def test_growth_is_told_as_missed(found: Found) -> None:
    queue = {ALONE: flat(40.0, 10, 100) | flat(60.0, 1000), TENS: flat(5.0, 10, 1000)}
    grown = found._replace(core=found.core._replace(queue=queue))
    missed = [one for one in scale.verdicts(grown) if "cores, queue" in one.what and not one.holds]
    assert [one.measured for one in missed] == ["1.50 x"]
    assert "**missed**" in scale.tables(grown)


def test_a_missed_figure_is_printed_and_fails_the_command(
    found: Found,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    grown = found._replace(core=found.core._replace(clients=flat(1.0, 10) | flat(2.0, 100)))
    monkeypatch.setattr(scale, "measure", lambda size: grown)
    assert main(["--output", str(tmp_path)]) == 1
    assert "MISSED: cores, clients that wait: 10 to 100: 2.00 x" in capsys.readouterr().err
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"queue.svg", "workers.svg", "sockets.svg", "scale.md"}


def test_growth_is_from_ten_on() -> None:
    """A single worker has nobody to share a cost with."""
    assert scale.growth(flat(9.0, 1) | flat(2.0, 10) | flat(3.0, 100)) == 1.5
    assert scale.growth(flat(2.0, 1) | flat(3.0, 3)) == 1.5


def test_a_larger_site_has_more_brokers(found: Found) -> None:
    fleets = {
        transport: one._replace(cpu={**one.cpu, ALONE: flat(100.0, 10)})
        for transport, one in found.fleets.items()
    }
    table = scale.sites(
        found._replace(fleets=fleets)
    )  # 10,000 tasks a second, of which 7,000 count
    (line,) = [line for line in table.splitlines() if line.startswith("| 1,000 |")]
    assert line.split("|")[2:5] == [" 15 ", " 2 ", " 1 (14.3% of one) "]


# --- The crowd ------------------------------------------------------------------------------------


def test_a_crowd_has_its_tasks_done_once_each() -> None:
    crowd = Crowd(3, clients=2)
    assert crowd.run(TENS, 500, 100) > 0
    assert crowd.done >= 500
    assert crowd.open <= 100
    assert crowd.idle(2.0) > 0
    crowd.sessions.check_invariants()
    status = crowd.sessions.scheduler.status(crowd.now)
    assert (len(status.workers), status.late, status.reassigned) == (3, 0, 0)


def test_the_queue_is_as_long_as_wanted() -> None:
    crowd = Crowd(1)
    crowd.run(ALONE, 20, 1_000)
    assert crowd.sessions.scheduler.status(crowd.now).queued >= 1_000 - 4  # two run, two are done


# --- Its ends -------------------------------------------------------------------------------------


def test_a_wrong_result_is_noticed() -> None:
    asker = Asker()
    asker.ask(ALONE, 2)
    right = fakes.result_of(1)
    asker.answer(p.Results([1], b"\0", [right]))
    for payloads in ([right], [b"\0" * 8]):
        with pytest.raises(WrongResult, match="task"):
            asker.answer(p.Results([1], b"\0", [*payloads]))
    with pytest.raises(WrongResult, match="failed"):
        asker.answer(p.Results([2], b"\1", [fakes.result_of(2)]))
    with pytest.raises(WrongResult, match="Gone"):
        asker.answer(p.Gone())


def test_bytes_that_have_changed_are_noticed() -> None:
    size = 9 << 20  # in several parts
    payload = call(7, size)
    assert isinstance(payload, p.Parts)
    assert payload.nbytes == size
    run = p.Run(1, 1, ALONE.fn, 0, [7], [payload])
    (done,) = Answerer().answer(run)
    assert isinstance(done, p.Done)
    assert done.payloads == [fakes.result_of(7)]
    damaged = bytearray(payload[1])
    damaged[-1] ^= 1
    run.payloads = [p.Parts((payload[0], damaged, *payload[2:]))]
    with pytest.raises(WrongResult, match="have changed"):
        Answerer().answer(run)


def test_a_client_stays_within_what_it_was_granted() -> None:
    load = fakes.of_size(1 << 20)
    asker = Asker()
    asker.answer(p.Credit(3 << 20))
    while asker.has_room(load):
        asker.ask(load, 1)
    assert len(asker.open) == 2  # the function takes some of it
