"""Phases are timed once each, those within others too."""

from pipeline.phases import Phases


def test_what_a_phase_within_another_takes_is_its_own() -> None:
    now = 0.0
    phases = Phases(lambda: now)
    phases.keep_spans()
    with phases("draft"):
        now += 1.0
        with phases("commit"):
            now += 2.0
            with phases("retrieve"):
                now += 4.0
            now += 8.0
        now += 16.0
        with phases("commit"):
            now += 32.0
    assert phases.seconds == {"draft": 17.0, "commit": 42.0, "retrieve": 4.0}
    assert phases.spans is not None
    assert list(phases.spans) == [
        ("retrieve", 3.0, 4.0),
        ("commit", 1.0, 14.0),
        ("commit", 31.0, 32.0),
        ("draft", 0.0, 63.0),
    ]
