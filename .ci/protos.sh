#!/usr/bin/env bash
# Generate ztunnel/wire/pb from ztunnel/wire/proto: protos.sh write, or protos.sh check to compare only.

source "$(dirname "$0")/common.sh"

PYTHON=${PYTHON:-.venv/bin/python}
mkdir -p .cache
fresh=$(mktemp -d .cache/protos.XXXXXX)
trap 'rm -rf "$fresh"' EXIT

"$PYTHON" -m grpc_tools.protoc -I ztunnel/wire/proto --python_out="$fresh" --pyi_out="$fresh" ztunnel/wire/proto/*.proto
# protoc imports its neighbours as top-level modules, but ours live in a package.
sed -i -E 's/^import ([a-z0-9_]+_pb2)/from ztunnel.wire.pb import \1/' "$fresh"/*.py "$fresh"/*.pyi

case ${1:-} in
  write)
    rm -f ztunnel/wire/pb/*_pb2.py ztunnel/wire/pb/*_pb2.pyi
    cp "$fresh"/* ztunnel/wire/pb/
    say "verdict: wrote $(find "$fresh" -name '*_pb2.py' | wc -l) modules to ztunnel/wire/pb"
    ;;
  check)
    if ! diff -r --brief --exclude=__pycache__ --exclude=__init__.py "$fresh" ztunnel/wire/pb; then
      give_up "ztunnel/wire/pb differs from ztunnel/wire/proto; run: make protos"
    fi
    say "verdict: ztunnel/wire/pb is current"
    ;;
  *) give_up "protos.sh knows write and check" ;;
esac
