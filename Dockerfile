# A Refract server: the image holds the code, the model comes at start.
#
#   docker build -t refract .                        # for NVIDIA GPUs, and CPUs: with torch's CUDA
#   docker build -t refract:cpu --target cpu .       # for CPUs: without NVIDIA's libraries
#   docker build -t refract:train --target train .   # no server: what trains, by hand or by the clock
#
# Serve a bundle's folder on a CPU, and on a GPU (needs the NVIDIA Container Toolkit); the champion of an MLflow registry:
#   docker run --rm -p 8000:8000 -v /path/to/bundle:/model:ro refract:cpu
#   docker run --rm -p 8000:8000 -v /path/to/bundle:/model:ro --gpus all refract
#   docker run --rm -p 8000:8000 -e MLFLOW_TRACKING_URI=http://mlflow:5000 refract:cpu models:/NAME@champion
# Or put the bundle into the image:
#   docker build -t mine --target cpu-with-model --build-context model=runs/NAME/bundle .    # or cuda-with-model
#
# It writes to /tmp only, and without: the rest may be read-only, and it needs no capability. A volume at /tmp/.cache keeps
# downloaded models. pip's configuration, for an index of one's own, comes as a secret: --secret id=pip,src=/etc/pip.conf

ARG BASE=python:3.12-slim

FROM ${BASE} AS tools
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# What installs is not part of what is installed.
RUN python3 -m venv /opt/tools && python3 -m venv --without-pip /opt/refract
COPY requirements-serve.lock /src/

FROM tools AS packages-cuda
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    /opt/tools/bin/pip --python /opt/refract/bin/python3 install --require-hashes --no-deps -r /src/requirements-serve.lock

FROM tools AS packages-train
COPY requirements-train.lock /src/
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    /opt/tools/bin/pip --python /opt/refract/bin/python3 install --require-hashes --no-deps -r /src/requirements-train.lock

FROM tools AS packages-cpu
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY deploy/without_cuda.py /src/
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    /opt/tools/bin/pip --python /opt/refract/bin/python3 install --require-hashes --no-deps -r /src/requirements-serve.lock \
    && /opt/refract/bin/python3 /src/without_cuda.py \
    && /opt/refract/bin/python3 -c "import torch, torchvision, timm, openvino"

FROM tools AS code
COPY requirements-build.lock /src/
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    /opt/tools/bin/pip install --require-hashes --no-deps -r /src/requirements-build.lock
COPY pyproject.toml README.md LICENSE /src/
COPY refract /src/refract
COPY augment /src/augment
COPY models /src/models
COPY pipeline /src/pipeline
COPY serve /src/serve
COPY configs /src/configs
RUN /opt/tools/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /wheels /src \
    && /opt/tools/bin/pip --python /opt/refract/bin/python3 install --no-deps --no-index /wheels/*.whl

# What trains: `refract retrain`, `refract schedule`, and MLflow's server with PostgreSQL's driver. All that it writes goes to /var/lib/refract.
FROM ${BASE} AS train
ENV PATH=/opt/refract/bin:$PATH PYTHONUNBUFFERED=1 HOME=/var/lib/refract/.home USER=refract MLFLOW_DISABLE_TELEMETRY=true DO_NOT_TRACK=true
RUN useradd --uid 10001 --home-dir /var/lib/refract --no-create-home refract && install -d -o 10001 -g 10001 /var/lib/refract /data
COPY --from=packages-train /opt/refract /opt/refract
COPY --from=code /opt/refract /opt/refract
USER 10001:10001
WORKDIR /var/lib/refract
ENTRYPOINT ["refract"]
CMD ["--help"]

FROM ${BASE} AS server
ENV PATH=/opt/refract/bin:$PATH PYTHONUNBUFFERED=1 ORT_DISABLE_TELEMETRY=1 HOME=/tmp
# A volume that is mounted at an image's folder takes over its owner.
RUN useradd --uid 10001 --home-dir /tmp --no-create-home refract && install -d -o 10001 -g 10001 /tmp/.cache
# A number: Kubernetes cannot tell of a name whether it is root.
USER 10001:10001
WORKDIR /tmp
EXPOSE 8000
# Asks port 8000: a container started with another --port needs its own --health-cmd.
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/livez', timeout=2)"]
ENTRYPOINT ["refract", "serve", "--host", "0.0.0.0"]
CMD ["/model"]

# The dependencies are a layer of their own: they change less often than the code.
FROM server AS cpu
COPY --from=packages-cpu /opt/refract /opt/refract
COPY --from=code /opt/refract /opt/refract

FROM cpu AS cpu-with-model
COPY --from=model . /model

FROM server AS cuda
# Triton, which compiles kernels for the backend `compiled`, builds their launchers in C.
USER root
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
USER 10001:10001
COPY --from=packages-cuda /opt/refract /opt/refract
COPY --from=code /opt/refract /opt/refract

FROM cuda AS cuda-with-model
COPY --from=model . /model

# The last is what a build without --target makes.
FROM cuda
