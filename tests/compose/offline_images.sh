#!/usr/bin/env bash
# offline_images.sh FOLDER: root file systems for container images, as tar files, where no registry is in reach.
#
#   forky.tar, bookworm.tar   Debian's Prometheus, Alertmanager and node exporter of two releases, at the paths of the
#                             official images, with busybox for their health checks
#   python.tar                Debian bookworm's Python with venv, in place of python:…-slim-bookworm
#
# The packages are unpacked, not installed: what runs needs no more. Does nothing for a file that is there.
set -euo pipefail
[ $# = 1 ] || { echo "usage: $0 FOLDER" >&2; exit 2; }
top="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
source "$top/.ci/debian_packages.sh"
mkdir -p "$1"
cache="$(cd "$1" && pwd)"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

pack() {
  tar -C "$1" -cf "$2.part" . && mv -f "$2.part" "$2"
  rm -rf "$1"
}

# root_of SUITE FOLDER PACKAGES: the packages' files, unpacked over the merged /usr that base-files would make.
root_of() {
  local suite="$1" root="$2" name
  shift 2
  mkdir -p "$root"/usr/{bin,sbin,lib,lib64} "$root"/{etc,tmp,proc,sys,dev,run,root}
  for name in bin sbin lib lib64; do ln -s "usr/$name" "$root/$name"; done
  unpack_from_debian "$suite" "$root-unpacked" libc6 busybox-static "$@"
  tar -C "$root-unpacked" -c . | tar -C "$root" -x --keep-directory-symlink
  rm -rf "$root-unpacked" "$root/usr/share"/{doc,man,locale,i18n}
  for name in sh wget cat ls rm mkdir chmod chown cp mv ln env; do
    [ -e "$root/usr/bin/$name" ] || ln -s busybox "$root/usr/bin/$name"
  done
  printf 'root:x:0:0::/root:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n' > "$root/etc/passwd"
  chmod 1777 "$root/tmp"
}

prometheus_of() {
  local suite="$1" root="$work/$1"
  shift
  [ ! -f "$cache/$suite.tar" ] || return 0
  root_of "$suite" "$root" prometheus prometheus-alertmanager prometheus-node-exporter "$@"
  ln -s prometheus-alertmanager "$root/usr/bin/alertmanager"
  ln -s prometheus-node-exporter "$root/usr/bin/node_exporter"
  # A named volume takes owner and mode over from the folder that it covers.
  mkdir "$root/prometheus" "$root/alertmanager"
  chown 65534:65534 "$root/prometheus" "$root/alertmanager"
  pack "$root" "$cache/$suite.tar"
}

python_base() {
  [ ! -f "$cache/python.tar" ] || return 0
  root_of bookworm "$work/python" python3.11 python3.11-minimal libpython3.11-minimal libpython3.11-stdlib \
    python3.11-venv python3-pip-whl python3-setuptools-whl media-types tzdata zlib1g libssl3 libffi8 libexpat1 \
    ca-certificates libsqlite3-0 liblzma5 libbz2-1.0 libuuid1 libncursesw6 libtinfo6 libreadline8 libcrypt1 libgcc-s1 libstdc++6
  ln -s python3.11 "$work/python/usr/bin/python3"
  # Debian's pip does not start without a bundle, whatever it is asked to do.
  mkdir -p "$work/python/etc/ssl/certs"
  cat "$work/python/usr/share/ca-certificates/mozilla"/*.crt > "$work/python/etc/ssl/certs/ca-certificates.crt"
  pack "$work/python" "$cache/python.tar"
}

prometheus_of forky promtool & first=$!
prometheus_of bookworm & second=$!
python_base & third=$!
failed=0
wait $first || failed=1
wait $second || failed=1
wait $third || failed=1
exit $failed
