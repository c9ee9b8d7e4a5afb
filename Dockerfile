# The benchmark on CUDA PyTorch.
#   docker build -t unet3d .
#   docker run --rm --gpus all --ipc=host -v RAW:/raw:ro -v DATA:/data unet3d python3 preprocess_dataset.py \
#       --data_dir /raw --results_dir /data
#   docker run --rm --gpus all --ipc=host -v DATA:/data:ro -v LOGS:/results unet3d python3 main.py --amp --epochs 4000
# DATA and LOGS must be writable for user 1000. --ipc=host: loader workers pass batches through shared memory.
ARG BASE=pytorch/pytorch:2.13.0-cuda13.0-cudnn9-runtime
FROM ${BASE}

WORKDIR /workspace/unet3d
COPY requirements.txt .
# The image contains PyTorch, which stays if it is the pinned version. A vendor's image: `--build-arg BASE=…`, and here
# `COPY pyproject.toml README.md ./` and `pip install .` instead, whose ranges keep its PyTorch.
# Images on Ubuntu 24.04 have the system's Python, which pip changes only on request, and a user with the id 1000.
ENV PIP_BREAK_SYSTEM_PACKAGES=1
RUN pip install --no-cache-dir -r requirements.txt

# NVIDIA apex for its FusedLAMB: pass a wheel that fits the image and is beside this file (there is none on PyPI; the
# `apex` there is a different program). Without it `--optimizer lamb` uses this project's own LAMB.
ARG APEX_WHEEL=""
COPY . .
RUN if [ -n "${APEX_WHEEL}" ]; then pip install --no-cache-dir --no-deps "./${APEX_WHEEL}"; fi

RUN useradd --non-unique --create-home --uid 1000 unet3d && mkdir -p /data /results && chown unet3d /data /results
USER unet3d
# Defaults in a container: `main.py --amp --epochs 4000` reads its data from and writes its logs to the mounted volumes.
ENV UNET3D_DATA_DIR=/data UNET3D_LOG_DIR=/results PYTHONUNBUFFERED=1
CMD ["python3", "main.py", "--help"]
