# The one image: Ray head, Ray workers, job submitters. Build and push:
#   docker build -t registry.example.com/mtl-dist:0.1.0 . && docker push registry.example.com/mtl-dist:0.1.0
# The torch wheels bring the CUDA libraries; the host brings the driver. Needs BuildKit (the default builder).
FROM python:3.11-slim

# wget: KubeRay's probes. procps: the preStop hook waits for ranks with pgrep. openssh-client, rsync: `ray up` works with both
# inside the container. gcc, libc6-dev: triton builds its launcher with the C compiler it finds.
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates gcc libc6-dev openssh-client procps rsync wget \
 && rm -rf /var/lib/apt/lists/*

# Number 1000 because `ray up` copies files in with the owner they have on the host, where the login user is 1000.
RUN useradd --uid 1000 --user-group --create-home --shell /bin/bash ray \
 && install -d -o ray -g ray /cache /home/ray/.ray

# Into the system Python, not a virtual environment: login shells (KubeRay, `ray up`) reset PATH, and /usr/local/bin survives.
# Dependencies come before sources, and torch (most of the bytes) before the rest, so that an edit rebuilds only the last layer.
WORKDIR /app
COPY pyproject.toml constraints.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install -c constraints.txt torch torchvision
RUN --mount=type=cache,target=/root/.cache/pip \
    python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
extras = [r for name in ('search', 'video', 'faces') for r in p['optional-dependencies'][name] if 'mtl_dist' not in r]; \
print(*p['dependencies'], *extras, sep='\n')" > requirements.txt \
 && pip install -c constraints.txt -r requirements.txt
COPY README.md LICENSE ./
COPY mtl_dist mtl_dist
COPY tune tune
COPY cluster cluster
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --no-deps .

# HOME is spelled out because `ray up` reads it from the image; the user is a number so that runAsNonRoot can check it.
# A run that `ray job stop` ends saves first: Ray gives a driver so many seconds, 3 by default.
ENV HOME=/home/ray PYTHONUNBUFFERED=1 RAY_JOB_STOP_WAIT_TIME_S=60
WORKDIR /home/ray
USER 1000:1000
CMD ["bash"]
