# Two images from one file: the sidecar, which needs no torch and is small, and a trainer.
#
#   docker build --target sidecar -t obsinfra-sidecar:0.1.0 .
#   docker build --target trainer -t obsinfra-trainer:0.1.0-cpu .
#   docker build --target trainer -t obsinfra-trainer:0.1.0-cuda \
#     --build-arg BASE=nvidia/cuda:12.6.3-runtime-ubuntu24.04 \
#     --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu126 .
#
# A folder wheels/ beside this file, if there is one, is looked into before any index; with
# --build-arg PIP_NO_INDEX=1 nothing else is asked, so that the images can be built without a network.
ARG BASE=python:3.11.13-slim-bookworm

FROM ${BASE} AS python
# CUDA's images come without Python.
RUN python3 -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
  || (apt-get update && apt-get install -y --no-install-recommends python3 python3-venv \
  && rm -rf /var/lib/apt/lists/*)
ENV PATH=/opt/obsinfra/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

FROM python AS light-packages
ARG PIP_NO_INDEX
WORKDIR /build
COPY pyproject.toml constraints.txt wheel[s] ./
RUN python3 -m venv /opt/obsinfra \
  && python3 -c "import tomllib; names = tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies']; \
open('light.txt', 'w').write('\n'.join(name for name in names if not name.startswith('torch')))" \
  && pip install --no-cache-dir --disable-pip-version-check --find-links . -c constraints.txt -r light.txt

FROM light-packages AS light
COPY . .
RUN pip install --no-cache-dir --disable-pip-version-check --find-links . --no-deps . \
  && pip uninstall --yes --quiet pip

FROM python AS sidecar
COPY --from=light /opt/obsinfra /opt/obsinfra
WORKDIR /runs
USER 10001:10001
EXPOSE 9465
ENTRYPOINT ["python3", "-m", "obsinfra.control.sidecar"]

FROM light-packages AS full
ARG EXTRAS=examples
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir --disable-pip-version-check --find-links . -c constraints.txt --index-url "$TORCH_INDEX" torch
COPY . .
RUN pip install --no-cache-dir --disable-pip-version-check --find-links . -c constraints.txt ".[$EXTRAS]" \
  && pip uninstall --yes --quiet pip

FROM python AS trainer
COPY --from=full /opt/obsinfra /opt/obsinfra
WORKDIR /work
USER 10001:10001
EXPOSE 9464
ENTRYPOINT ["obsinfra"]
