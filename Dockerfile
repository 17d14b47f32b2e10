# A Refract server: the image holds the code, the model comes at start.
#
# Build, in the repository:
#   docker build -t refract .
# Serve a bundle's folder on a CPU, and on a GPU (needs the NVIDIA Container Toolkit):
#   docker run --rm -p 8000:8000 -v /path/to/bundle:/model:ro refract
#   docker run --rm -p 8000:8000 --gpus all -v /path/to/bundle:/model:ro refract
# Serve the champion of an MLflow registry:
#   docker run --rm -p 8000:8000 -e MLFLOW_TRACKING_URI=http://mlflow:5000 \
#     refract models:/my-model@champion --host 0.0.0.0 --port 8000
#
# The locked torch carries its CUDA libraries, so one image serves both; that makes it several gigabytes.

FROM python:3.12-slim AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/refract
ENV PATH=/opt/refract/bin:$PATH
# The dependencies first: they change less often than the code, and their layer is kept while they do not.
COPY requirements.lock /src/
RUN pip install --require-hashes --no-deps -r /src/requirements.lock
COPY pyproject.toml README.md LICENSE refract.py /src/
COPY augment /src/augment
COPY models /src/models
COPY pipeline /src/pipeline
COPY serve /src/serve
COPY configs /src/configs
# hatchling, which builds the project, is in the lock: no second, unlocked download.
RUN pip install --no-deps --no-build-isolation /src

FROM python:3.12-slim
ENV PATH=/opt/refract/bin:$PATH PYTHONUNBUFFERED=1
COPY --from=build /opt/refract /opt/refract
RUN useradd --create-home --uid 10001 refract
USER refract
WORKDIR /home/refract
EXPOSE 8000
# Asks port 8000: a container started with another --port needs its own --health-cmd.
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/livez', timeout=2)"]
ENTRYPOINT ["refract", "serve"]
CMD ["/model", "--host", "0.0.0.0", "--port", "8000"]
