"""``sage-llm completion``: what a shell needs to complete our commands, options and model names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from sagellm import store
from sagellm.cli.common import single
from sagellm_protocol.errors import InvalidArgumentError

if TYPE_CHECKING:
    from sagellm.cli.main import Command

_BASH = """_sage_llm() {
    local line="${COMP_LINE:0:COMP_POINT}" current="" colon="" IFS=$' \\t\\n'
    local -a typed
    read -ra typed <<< "$line"
    [[ $line == *[[:space:]] ]] || { current="${typed[-1]}"; unset 'typed[-1]'; }
    IFS=$'\\n'
    COMPREPLY=($(compgen -W "$(sage-llm completion --words -- "${typed[@]:1}" 2>/dev/null)" -- "$current"))
    [ ${#COMPREPLY[@]} -gt 0 ] || COMPREPLY=($(compgen -f -- "$current"))
    # A colon ends a word here: what stands before it is not replaced.
    [[ $COMP_WORDBREAKS != *:* ]] || colon="${current%"${current##*:}"}"
    COMPREPLY=("${COMPREPLY[@]#"$colon"}")
}
complete -F _sage_llm sage-llm sagellm
"""
_ZSH = """#compdef sage-llm sagellm
_sage_llm() {
    local -a words_
    words_=(${(f)"$(sage-llm completion --words -- "${words[@]:1:$CURRENT-2}" 2>/dev/null)"})
    compadd -a words_ || _files
}
compdef _sage_llm sage-llm sagellm
"""
_FISH = """for program in sage-llm sagellm
    complete -c $program -n __fish_use_subcommand -f
    complete -c $program -a '(sage-llm completion --words -- (commandline -opc)[2..-1] 2>/dev/null)'
end
"""
_SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}
_TAKES_MODEL = {"run", "serve", "rm", "show", "cp", "plan", "bench", "demo"}


def completion(
    shell: Annotated[str, typer.Argument(help="bash, zsh or fish.")] = "bash",
    words: Annotated[bool, typer.Option("--words", hidden=True, help="Print what may follow the given words.")] = False,
    typed: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
) -> None:
    """Print the completion script of a shell: `source <(sage-llm completion bash)`."""
    if words:
        before = ([shell] if shell != "bash" or typed else []) + (typed or [])
        print("\n".join(following(before)))
        return
    if shell not in _SCRIPTS:
        raise InvalidArgumentError(f"no completion for {shell!r}: use one of {', '.join(_SCRIPTS)}", param="shell")
    print(_SCRIPTS[shell], end="")


def following(typed: list[str]) -> list[str]:
    """Return the words that may come after `typed` (without the program's name)."""
    from sagellm.cli.main import ALIASES, COMMANDS

    if not typed:
        return sorted([*COMMANDS, *ALIASES])
    name = ALIASES.get(typed[0], typed[0])
    command = COMMANDS.get(name)
    if command is None:
        return []
    out = _options(command, typed[1:])
    if name in _TAKES_MODEL:
        out += [model.name for model in store.installed()]
    if name == "pull":
        out += list(store.CATALOG)
    return out


def _options(command: Command, typed: list[str]) -> list[str]:
    from sagellm.cli.parameters import parameters_of, subcommands_of

    commands = subcommands_of(command)
    chosen = next((word for word in typed if word in commands), None)
    if commands and chosen is None:
        return sorted(commands)
    flags = [flag for parameter in parameters_of(command, chosen) for flag in parameter.flags if flag.startswith("--")]
    return [*flags, "--help"]


app = single(completion)
