"""What docs/requests.md needs of grpcurl, for machines that have none: the same flags, the same
JSON in and out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from google.protobuf import json_format

from preheat.torchserve.client import Client, messages


def main() -> None:
    parser = argparse.ArgumentParser(prog="grpcurl")
    parser.add_argument("-plaintext", action="store_true", required=True)
    parser.add_argument("-max-msg-sz", type=int)
    parser.add_argument("-import-path", type=Path, required=True)
    parser.add_argument("-proto", required=True)
    parser.add_argument("-d", required=True)
    parser.add_argument("target")
    parser.add_argument("method")
    options = parser.parse_args()
    proto = (options.import_path / options.proto).read_text()
    service, _, method = options.method.rpartition("/")
    package, _, name = service.rpartition(".")
    assert (
        f"package {package};" in proto and f"service {name} " in proto and f"rpc {method}(" in proto
    )
    request = json_format.Parse(options.d, messages()[0]())
    with Client(request.model_name, grpc_target=options.target) as client:
        reply = client.call_grpc(dict(request.input))
    assert reply.status == 0, reply.body
    print(
        json.dumps(
            json.loads(json_format.MessageToJson(messages()[1](prediction=reply.body))), indent=2
        )
    )


main()
