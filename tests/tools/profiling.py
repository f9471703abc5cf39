"""The peak of a profiled run's tensors, for the tests of `estimate` and for the bench."""

from torch.profiler import profile


def profiled_peak(profiler: profile) -> int:
    """The most bytes of tensors alive at once from the event "training" on."""
    events = profiler.profiler.kineto_results.events()
    begin = next(event.start_ns() for event in events if event.name() == "training")
    alive = peak = 0
    for event in sorted((event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns()):
        alive += event.nbytes()
        if event.start_ns() >= begin:
            peak = max(peak, alive)
    return peak
