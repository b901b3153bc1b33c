#!/usr/bin/env bash
# One command from a fresh machine to a training run: makes .venv if missing, installs the pinned dependencies,
# starts the native stack where Prometheus and Alertmanager are installed, and trains.
#
#   ./launch_training.sh [--install-stack] [options of 'obsinfra train']
#   ./launch_training.sh --help
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$here/.ci/environment.sh"

arguments=()
for argument in "$@"; do
  if [ "$argument" = "--install-stack" ]; then
    install_stack
  else
    arguments+=("$argument")
  fi
done
make_environment examples
exec "$venv/bin/obsinfra" train --stack auto ${arguments[@]+"${arguments[@]}"}
