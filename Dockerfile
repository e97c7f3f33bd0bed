# Build:  docker build -t lora .
# Run:    docker run --rm --gpus all -v "$PWD:/workspace" -v lora-cache:/cache lora train recipe.yaml
#
# torch's wheels bring the CUDA libraries they were built for, so the base image adds only what the NVIDIA
# container runtime looks for. Its CUDA version is the one of the torch pinned in constraints.txt.
FROM nvidia/cuda:13.0.2-base-ubuntu24.04

# Ubuntu deletes replaced package versions from its archive: an exact pin would stop the build at the next update.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

# Models and data sets live in a volume, so that a new container downloads nothing twice.
# Anybody may write there, as in /tmp: `docker run --user "$(id -u)"` then works too.
ENV HF_HOME=/cache/huggingface
RUN install --directory --mode=1777 /cache
VOLUME ["/cache"]

# Several GB of dependencies, rebuilt only when these few files change. The install is editable:
# it points at /opt/lora, and the source copied last is in place without another install.
WORKDIR /opt/lora
ENV PATH=/opt/lora/.venv/bin:$PATH
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY lora_cli/__init__.py lora_cli/
RUN python3 -m venv .venv \
    && .venv/bin/pip install --no-cache-dir --constraint constraints.txt --editable .
COPY lora_cli lora_cli

# The base image's own user, `ubuntu`: the usual owner of a folder mounted at /workspace.
USER 1000:1000
WORKDIR /workspace
ENTRYPOINT ["lora"]
CMD ["--help"]
