#!/bin/sh
# Pins what the image is made of: every version, and the hash of every file it may come as. Needs uv. Run it when dependencies in
# pyproject.toml change (tests/deploy/test_image.py says when), or for newer versions: deploy/image/lock.sh --upgrade
set -eu
cd "$(dirname "$0")/../.."
compile() {
    uv pip compile --quiet --no-header --no-annotate --no-emit-index-url --no-emit-find-links --generate-hashes --no-build \
        --python-version 3.11 --python-platform x86_64-manylinux_2_28 "$@"
}
# The client of Hugging Face's hub, which tokenizers asks for to download with, and what that needs: the picker reads files.
without() { for package in huggingface-hub hf-xet fsspec tqdm filelock click packaging; do printf -- '--no-emit-package %s ' "$package"; done; }
# shellcheck disable=SC2046
compile $(without) --extra kubernetes --extra tokenize --extra uvloop --extra valkey "$@" pyproject.toml --output-file deploy/image/requirements.txt
# The build backend, as [build-system] asks for it.
sed -n 's/^requires = \["\(.*\)"\].*/\1/p' pyproject.toml | compile "$@" - --output-file deploy/image/requirements-build.txt
