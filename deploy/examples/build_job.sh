#!/bin/sh
# Compile a model's engines on a running Ray cluster, ahead of serving:
#
#     deploy/examples/build_job.sh meta-llama/Llama-3.1-8B --tp 8 --target sm_90,sm_120
#
# Arguments are those of `tensorray build`. The job runs on the cluster's head node; only there does
# the store have to be writable, and a local model be readable. RAY_ADDRESS is the dashboard's
# address. Exit status: 0 when every plan is in the store, else 1; the log says why, and the job's
# own status (ray job list) is that of `tensorray build`.
set -e
exec ray job submit --address "${RAY_ADDRESS:-http://127.0.0.1:8265}" -- tensorray build "$@"
