"""Operator and agents as shipped, in a cluster that is simulated: what must hold is judged after each step.

Shipped code, unchanged: the operator's edge, queue, observer, planner, actor, Events and elector (`operators`); the
agents' supervisor, machine, uploader, committer, ledger, Lease writer and heartbeats (`agents`). Simulated is the rest:

    virtual_time   an event loop whose clock jumps; blocking code in threads, one of which runs at a time
    api_server     objects, uids, resourceVersions, preconditions, apply of a status
    control_plane  gang scheduler, node lifecycle, taint manager, garbage collector
    machines       kubelets, containers, power and network of machines
    workers        fork servers and process groups, which count iterations
    store          S3 with conditional PUTs
    network        what befalls a call to the API or to S3
    clients        the two clients of the API
    checks         what must hold: judged at each write, each start of workers, each change of HEAD
    faults         what a schedule may order, and Hypothesis' strategies of them
    world          puts them together: `Simulation(Schedule(...)).run()`
    search         so many schedules, in one process or several
    memo           pure functions remembered between calls; nothing that decides

A violation is raised with its story: the schedule, as an expression to be pasted into a test, and what happened when.

To extend it
- A fault: a frozen dataclass in `faults` with `happen(sim)`, and a line in `FAULTS`. Where it may be the run's own
  doing, or can't be told from it, it adds to `sim.chargeable`. What lasts is ended in `Simulation.all_is_well`.
- A thing that must hold: a method of `Checks` that calls `require`. What must hold only of some schedules is the
  `check` of `find_violation`, with `among` drawing those schedules.
- A feature of the spec: a field of `Schedule`, put into `_spec`.
- A message between agent and fork server: a case in `ForkServer.obey`.
- A kind of object: nothing, as long as it is created, replaced, patched and deleted as others are;
  `control_plane.OWNED` where the garbage collector has to take it.
- A new mechanism is worth a planted bug in `tests/simulation/test_planted_bugs.py`: take it away, see it found.

What it can't show: that Kubernetes behaves as `control_plane` and `machines` say (the dev cluster does), and the
process group itself. Hangs are not simulated: agents watch no stamps here.
"""
