"""Command lines as vLLM's users write them: `--max_model_len`, `-tp 2`, several values after one
`--served-model-name`; and the help, in parts."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand

from tensorray.cluster.elsewhere import ELSEWHERE

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
