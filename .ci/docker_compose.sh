#!/usr/bin/env bash
# docker_compose.sh FOLDER: Docker's Compose plugin of Debian forky in FOLDER/cli-plugins, a place that DOCKER_CONFIG
# may name; Debian bookworm has none. Asks the Debian mirrors apt is configured with; says why when it cannot.
set -euo pipefail
[ $# = 1 ] || { echo "usage: $0 FOLDER" >&2; exit 2; }
source "$(dirname "${BASH_SOURCE[0]}")/debian_packages.sh"
mkdir -p "$1/cli-plugins"
folder="$(cd "$1" && pwd)"
plugin="$folder/cli-plugins/docker-compose"

"$plugin" version >/dev/null 2>&1 && exit
unpacked="$(mktemp -d)"
trap 'rm -rf "$unpacked"' EXIT
unpack_from_debian forky "$unpacked" docker-compose || { echo "compose: not to be had" >&2; exit 1; }
mv -f "$unpacked/usr/libexec/docker/cli-plugins/docker-compose" "$plugin"
"$plugin" version >/dev/null || { echo "compose: the plugin of Debian forky does not run here" >&2; exit 1; }
