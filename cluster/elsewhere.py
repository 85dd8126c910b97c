"""What stands here in the place of other servers' settings: what is said to who gives one."""

from __future__ import annotations

# Flags of vLLM and trtllm-serve that have another name here, or none: what to give in their place.
_HERE = {
    "--num-gpu-blocks-override": "give --num-kv-blocks",
    "--api-server-count": "give --num-ingress-replicas",
    "--pooler-config --override-pooler-config": "give --pooling-type",
    "--shutdown-timeout": "give --drain-timeout-seconds",
    "--kv-transfer-config": "give --prefill-replicas and --data-parallel-size",
    "--rope-scaling --rope-theta": "give --hf-overrides",
    "--compilation-config --optimization-level -O -cc --max-seq-len-to-capture": "give "
    "--cudagraph-capture-sizes, or --enforce-eager for no graphs",
    "--override-generation-config": "give --generation-config a directory with a "
    "generation_config.json",
    "--default-chat-template-kwargs": "give a --chat-template that sets them, or "
    "chat_template_kwargs in requests",
    "--trust-remote-code": "a checkpoint's code is never run; leave it out for what `tensorray "
    "models` lists, and give --model-class a file of your own for others",
    "--quantization -q": "leave it out: the checkpoint says how it is quantized",
    "--enable-chunked-prefill --async-scheduling --enable-request-id-headers "
    "--enable-prompt-tokens-details": "leave it out: always so",
    "--runner --convert --task": "leave it out: every server generates, embeds and scores",
    "--distributed-executor-backend": "leave it out: it is always Ray; RAY_ADDRESS names the "
    "cluster",
    "--data-parallel-size-local --data-parallel-address --data-parallel-rpc-port "
    "--data-parallel-backend --data-parallel-rank --data-parallel-start-rank --headless --nnodes "
    "--node-rank --master-addr --master-port": "leave it out: Ray places shards on the nodes that "
    "joined by `ray start`; RAY_ADDRESS names the cluster",
    "--enable-log-requests": "a line a request is always there; --log-prompts for its body",
    "--disable-log-requests --no-enable-log-requests --max-log-len": "leave it out: a request's "
    "line has no prompt",
    "--disable-log-stats": "leave it out: statistics are at /metrics, not in the log",
    "--uvicorn-log-level --disable-uvicorn-access-log": "leave it out: logs are Ray Serve's",
    "--swap-space --cpu-offload-gb --kv-offloading-size": "leave it out: nothing is swapped to "
    "the host; who is preempted is computed again",
    "--limit-mm-per-prompt --mm-processor-kwargs --mm-processor-cache-gb "
    "--allowed-local-media-path --media-io-kwargs": "leave it out: models take text only",
    "--guided-decoding-backend --structured-outputs-config": "leave it out: it is always "
    "llguidance",
    "--attention-backend --model-impl": "leave it out: there is one",
    "--tokenizer-mode --config-format": "leave it out: found out from the files",
    # trtllm-serve's
    "--max-batch-size": "give --max-num-seqs",
    "--max-num-tokens": "give --max-num-batched-tokens",
    "--max-seq-len": "give --max-model-len",
    "--tp-size": "give --tensor-parallel-size",
    "--pp-size": "give --pipeline-parallel-size",
    "--ep-size": "give --enable-expert-parallel, for all tensor-parallel shards",
    "--kv-cache-free-gpu-memory-fraction --free-gpu-memory-fraction": "give "
    "--gpu-memory-utilization, of the whole memory, weights included",
    "--extra-llm-api-options": "give --config a file of these flags, with underscores",
}
ELSEWHERE = {name: instead for names, instead in _HERE.items() for name in names.split()}
