#!/usr/bin/env bash
# newer_stack.sh FOLDER: Prometheus and Alertmanager of Debian forky, unpacked into FOLDER/usr/bin and not installed,
# so that the tests run on these versions too. Asks the Debian mirrors apt is configured with; says why when it cannot.
set -euo pipefail
[ $# = 1 ] || { echo "usage: $0 FOLDER" >&2; exit 2; }
source "$(dirname "${BASH_SOURCE[0]}")/debian_packages.sh"
mkdir -p "$1"
folder="$(cd "$1" && pwd)"
programs=(prometheus promtool prometheus-alertmanager amtool)

complete() {
  local program
  for program in "${programs[@]}"; do
    "$folder/usr/bin/$program" --version >/dev/null 2>&1 || return 1
  done
}

complete && exit
unpack_from_debian forky "$folder" prometheus promtool prometheus-alertmanager ||
  { echo "newer stack: not to be had" >&2; exit 1; }
complete || { echo "newer stack: the programs of Debian forky do not run here" >&2; exit 1; }
