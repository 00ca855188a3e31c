#!/bin/sh
# Builds the picker's image with what is on this machine: deploy/image/build.sh NAME[:TAG] [OPTION ...]
# BUILDER=docker|podman|buildah chooses; options go on to it: --platform linux/arm64, --build-arg BASE=..., --secret id=pip.conf,src=FILE.
set -eu
cd "$(dirname "$0")/../.."
if [ $# -eq 0 ]; then
    echo "usage: $0 NAME[:TAG] [OPTION ...]" >&2
    exit 2
fi
image=$1
shift
for found in ${BUILDER:-docker podman buildah}; do
    if command -v "$found" >/dev/null; then
        exec "$found" build --file deploy/Dockerfile --tag "$image" "$@" .
    fi
done
echo "$0: none of ${BUILDER:-docker, podman, buildah} is on this machine" >&2
exit 1
