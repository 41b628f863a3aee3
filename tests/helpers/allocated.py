"""Peak memory of a call on a CPU, as its allocator counts it.

Inside custom ops too, into which a dispatch mode does not see.
"""

from torch.profiler import ProfilerActivity, profile


def peak_bytes(run):
    """The most bytes that are allocated at one time while ``run`` goes on, above those before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        result = run()
    del result
    events = [e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
