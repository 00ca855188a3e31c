"""Flow control: who waits, who goes, who is told to come back.

`control.FlowControl` is a `Stage` (epp.arrival): `begin` lets a request pass, has it wait, or refuses it. It must be the last stage, so that
a request that passes is routed at once. It decides and never waits: time, timers and the queue's surroundings are handed in.

    flow = FlowControl(settings_of(config.flow_control, plugins), director.candidates, clock, loop.call_at,
                       detector=scheduler.detector, pool_name=datastore.name, evict=None)
    director.stages = (..., flow)

Whoever owns the director tells it what it can't see:

    routed(request, exchange)            a request it let through was charged; exchange None: refused after all. Synchronous, always
    first_token(request, endpoint, s)    ) the hooks of plugins.base.Hooks, as the scheduler calls them
    finished(request, endpoint, outcome) )
    changed()                            a reading came, endpoints came or went or turned ready: at most one pump per loop iteration
    provision(priorities)                the priorities of the objectives there are
    use(settings, detector)              a new configuration; what waits stays, by the new rules
    close("drain" | "reject", done)      no new waits; `done` is called when nobody waits any more

For the observer: `families.flow_families(flow, now_s)`, `flow.state()`.
"""
