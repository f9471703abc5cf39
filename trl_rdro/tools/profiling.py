"""What a run really held in memory, to compare `tools.memory.estimate` with."""

from torch.profiler import profile


def profiled_peak(profiler: profile) -> int:
    """
    The most bytes of tensors alive at once from the event "training" on.

    Args:
        profiler (`torch.profiler.profile`):
            A finished profile of the CPU with `profile_memory=True`, of which a part ran under
            `record_function("training")`. What was allocated before that part counts, its peak does not.
    """
    events = profiler.profiler.kineto_results.events()
    begin = next(event.start_ns() for event in events if event.name() == "training")
    alive = peak = 0
    for event in sorted((event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns()):
        alive += event.nbytes()
        if event.start_ns() >= begin:
            peak = max(peak, alive)
    return peak
