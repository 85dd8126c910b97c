#!/bin/sh
# Answer a file of requests in OpenAI's batch format on a running Ray cluster:
#
#     deploy/examples/batch_job.sh -i /data/in.jsonl -o /data/out.jsonl --model Qwen/Qwen3-0.6B
#
# Arguments are those of `tensorray batch`. Ray runs the job on a node with that many free GPUs
# (NUM_GPUS=0 for a CPU model), which has to see the files, so paths are on a shared file system.
# Submitting the same job again after a kill goes on where it ended. RAY_ADDRESS is the dashboard's
# address.
set -e
exec ray job submit --address "${RAY_ADDRESS:-http://127.0.0.1:8265}" \
    --entrypoint-num-gpus "${NUM_GPUS:-1}" -- tensorray batch "$@"
