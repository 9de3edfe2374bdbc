"""No compiler on the machine: everything is served eagerly, and the log, the state and the metrics
say so.
"""

from __future__ import annotations

from pathlib import Path

from preheat.torchserve.archive import build_archive
from served import opened, serving

LONE = """
minWorkers: 1
maxWorkers: 1
responseTimeout: 120
pt2:
  compile: {enable: true, backend: inductor}
  shapes: {buckets: [[64, 64]], batch_sizes: [1]}
pipeline: {guidance: "off", tasks: [text-to-image], defaults: {num_inference_steps: 2}}
"""


def test_without_a_compiler_the_server_becomes_ready_eagerly_and_loudly(
    tiny_sdxl: Path, tmp_path: Path
) -> None:
    config = tmp_path / "lone.yaml"
    config.write_text(LONE)
    archive = build_archive(config, tiny_sdxl, output=tmp_path / "archives")
    with serving(
        archive, tmp_path, cache=tmp_path / "cache", env={"CXX": "no-such-compiler"}
    ) as served:
        reply = served.client.predict({"prompt": "a", "height": 60, "width": 50})
        state, fallbacks = served.state(), served.metric("preheat_eager_fallbacks_total")
    assert reply.headers["x-preheat-engine"] == "eager" and opened(reply.body).size == (50, 60)
    (row,) = state["buckets"]
    assert row["engine"] == "eager" and "no-such-compiler" in row["reason"]
    assert state["eager_fallbacks"] == fallbacks == 1 and state["compiles_at_boot"] == 0
    assert "no-such-compiler" in (served.running.logs / "model_log.log").read_text()
