# A finished run as a service on port 8000, on a CPU; see docs/serve.md. From the repository's folder:
#   docker build --build-arg RUN=runs/finetune-1-0.0005 -t my-classifier .
#   docker run --rm -p 127.0.0.1:8000:8000 my-classifier
FROM python:3.11-slim

WORKDIR /minllama
COPY requirements.txt .
# The CPU build of torch first: plain pip would bring CUDA's, of several GB.
RUN pip install --no-cache-dir torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu \
    && pip install --no-cache-dir -r requirements.txt

# There is no C compiler in the image, so everything is computed by PyTorch (--kernels off says that it is meant).
COPY *.py fused.c ./
COPY commands commands
COPY config config
COPY data data
COPY formats formats
COPY training training
ARG RUN
COPY ${RUN}/best run/best

RUN useradd --uid 10001 minllama
USER minllama
EXPOSE 8000
HEALTHCHECK --start-period=60s CMD python -c \
    "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=5)"
# `docker stop` sends SIGTERM: what is in flight is answered.
ENTRYPOINT ["python", "run_llama.py", "--option", "serve", "--run", "run", "--host", "0.0.0.0", "--port", "8000", "--kernels", "off"]
