"""A short `make fuzz` against the server that the other tests ask; rare faults need a long one."""

from __future__ import annotations

from fuzz import Target, campaign, smallest
from fuzz_bodies import Sent
from served import Served

MAX_REQUEST_BYTES = 33_554_432  # of archive/config-demo.properties: nothing that is sent is as long
COUNT, SEED = 700, 20


def test_no_body_harms_the_worker_or_its_neighbours(served: Served) -> None:
    pids = served.worker_pids()
    target = Target(served.running, max_request_bytes=MAX_REQUEST_BYTES)
    try:
        tally = campaign(target, COUNT, SEED)
    finally:
        target.close()
    assert not tally.findings, "\n".join(str(finding) for finding in smallest(tally.findings))
    assert (
        tally.num_sent == COUNT and tally.num_probes == COUNT // 10 and tally.num_wrong_probes == 0
    )
    assert tally.outcomes["picture"] > 100 and tally.outcomes["refused"] > 200
    assert served.worker_pids() == pids
    state = served.state()
    assert (state["compiles_since_ready"], state["incidents"]) == (0, 0)


def test_an_input_map_that_names_a_rest_header_does_not_end_the_worker(served: Served) -> None:
    """Found by fuzzing: the handler tells gRPC from REST by `url_path`, and parts of a request
    stand among its headers.
    """
    pids = served.worker_pids()
    target = Target(served.running, max_request_bytes=MAX_REQUEST_BYTES)
    try:
        got = target.ask(Sent("found", protocol="grpc-stream", fields={"url_path": b""}))
    finally:
        target.close()
    assert got.status == 0 and b'"field": "url_path"' in got.body, got.body
    assert served.worker_pids() == pids
