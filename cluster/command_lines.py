"""Command lines as vLLM's users write them, and what stands here for flags that are not here.

Read as vLLM reads them: `--max_model_len`, `-tp 2`, several values after one `--served-model-name`.
"""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand

# Other names of flags, by field.
ALIASES = {
    "tensor_parallel_size": ("-tp",),
    "pipeline_parallel_size": ("-pp",),
    "data_parallel_size": ("-dp",),
    "enable_expert_parallel": ("-ep",),
    "tp": ("-tp", "--tensor-parallel-size"),
    "pp": ("-pp", "--pipeline-parallel-size"),
    "store": ("--plan-store",),
}

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
    "--enable-prompt-tokens-details --enable-tokenizer-info-endpoint": "leave it out: always so",
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
}
ELSEWHERE = {name: instead for names, instead in _HERE.items() for name in names.split()}


class Command(TyperCommand):
    """A command that reads its line as vLLM's users write one."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, self._rewritten(ctx, args))

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """The help's lists, one for each topic (`with_flags`) after the command's own flags."""
        lists: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if (record := parameter.get_help_record(ctx)) is not None:
                own = "Arguments" if parameter.param_type_name == "argument" else "Options"
                topic = getattr(parameter, "rich_help_panel", None) or own
                lists.setdefault(topic, []).append(record)
        for topic, records in lists.items():
            with formatter.section(topic):
                formatter.write_dl(records)

    def _rewritten(self, ctx: Any, args: list[str]) -> list[str]:
        options: dict[str, Any] = {}
        places = 0  # of words without a flag
        for parameter in self.get_params(ctx):
            if parameter.param_type_name == "argument":
                places += 1
            for name in (*parameter.opts, *parameter.secondary_opts):
                options[name] = parameter
        rewritten: list[str] = []
        repeated = ""  # the flag whose values go on, if it takes several
        words = iter(args)
        for word in words:
            if word == "--":
                return [*rewritten, word, *words]
            if word.startswith("-"):
                name, equals, value = word.partition("=")
                if name not in options and name.startswith("--"):
                    name = name.replace("_", "-")
                option = options.get(name)
                if option is None and name in ELSEWHERE:
                    ctx.fail(f"no {name} here; {ELSEWHERE[name]}")
                rewritten.append(name + equals + value)
                if option is not None and not option.is_flag and not equals:
                    rewritten += [value for value in [next(words, None)] if value is not None]
                repeated = name if option is not None and option.multiple else ""
            elif repeated and not places:
                rewritten += [repeated, word]
            else:
                places -= 1
                rewritten.append(word)
        return rewritten
