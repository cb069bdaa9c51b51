"""`opd completion`: tab completion for bash, zsh and fish.

The shell scripts call `opd completion --query LINE`, with the line up to the cursor, for the words that can stand at its end, one per
line. The options of `opd train` come from Hydra's own completion.
"""

import argparse
import re
from enum import Enum
from pathlib import Path

from opd import errors
from opd.cli import main
from opd.cli.arguments import Parser, split_targets

BASH = r"""_opd() {
    local line=${COMP_LINE:0:COMP_POINT} IFS=$'\n' word
    COMPREPLY=($("${COMP_WORDS[0]}" completion --query "$line" 2>/dev/null))
    word=${line##*[[:space:]]}
    word=${word%"${word##*[$COMP_WORDBREAKS]}"}  # readline only replaces what follows the last of these
    COMPREPLY=("${COMPREPLY[@]#"$word"}")
    [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *[=./] ]] && compopt -o nospace
}
complete -o default -F _opd opd"""

ZSH = r"""(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
_opd() {
    local -a replies
    replies=("${(@f)$(${~words[1]} completion --query "${(j: :)words[1,CURRENT-1]} $PREFIX" 2>/dev/null)}")
    if (( ! $#replies[1] )); then
        compset -P '*='
        _files
        return
    fi
    compadd -S '' -- ${(M)replies:#*[=./]}
    compadd -- ${replies:#*[=./]}
}
compdef _opd opd"""

FISH = r"""function __opd_complete
    set -l words (commandline -opc)
    $words[1] completion --query (commandline -cp) 2>/dev/null
end
complete -c opd -f -a '(__opd_complete)'"""

SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}
WITH_CONFIG = ("doctor", "eval", "sample", "score")  # and train: verbs that take options
DESCRIPTION = """Print a script that completes words with the tab key. For every new terminal, put the line of your shell into
~/.bashrc, ~/.zshrc or ~/.config/fish/config.fish."""
EXAMPLES = """eval "$(opd completion bash)"
eval "$(opd completion zsh)"
opd completion fish | source"""


def make_parser() -> Parser:
    parser = Parser("completion", print_script_or_words, DESCRIPTION, EXAMPLES)
    parser.add_argument("shell", nargs="?", metavar="bash|zsh|fish")
    parser.add_argument("--query", metavar="LINE", help="print the words that can complete LINE")
    return parser


def print_script_or_words(parsed: argparse.Namespace) -> None:
    if parsed.query is not None:
        print("\n".join(query(parsed.query)))
    elif parsed.shell in SCRIPTS:
        print(SCRIPTS[parsed.shell])
    else:
        raise errors.ConfigError(f"{parsed.shell or 'no shell'}: choose from {', '.join(SCRIPTS)}")


def query(line: str) -> list[str]:
    """Return the words that can replace the last word of `line`, which may be empty. There are none for a line that cannot be parsed."""
    words = line.split()
    last = words.pop() if words and not line[-1].isspace() else ""
    if len(words) < 2 or words[1] not in main.VERBS:
        candidates = list(main.VERBS) if len(words) == 1 else []
    else:
        from opd.cli import ls

        verb, earlier = words[1], words[2:]
        flags = long_flags(main.make_parser(verb))
        candidates = flags if last.startswith("-") else []
        if verb == "train":
            candidates = config_words(earlier, last)
        elif verb in WITH_CONFIG:
            candidates = [*candidates, *config_words(split_targets([word for word in earlier if word not in flags])[1], last)]
        elif verb == "ls":
            candidates = [*candidates, *ls.KINDS]
        elif verb == "cp":
            candidates = [*candidates, *ls.shipped_files()]
        elif verb == "completion":
            candidates = [*candidates, *SCRIPTS]
    return [candidate for candidate in candidates if candidate.startswith(last)]


def long_flags(parser: argparse.ArgumentParser) -> list[str]:
    return [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]


def config_words(earlier: list[str], last: str) -> list[str]:
    """Return what can replace the word `last` after the words `earlier`: Hydra's flags, groups and choices, options and their values."""
    from hydra._internal.utils import get_args_parser
    from hydra.errors import HydraException
    from hydra.plugins.completion_plugin import DefaultCompletionPlugin
    from omegaconf.errors import OmegaConfBaseException

    from opd.config import compose

    parser = get_args_parser()
    if last.startswith("-"):
        return long_flags(parser)
    key, equals, _ = last.partition("=")
    kind = compose.options().get(key)
    if equals and kind is bool:
        return [f"{key}=true", f"{key}=false"]
    if equals and isinstance(kind, type) and issubclass(kind, Enum):
        return [f"{key}={member.name}" for member in kind]
    try:
        parsed = parser.parse_intermixed_args(earlier)
    except SystemExit:
        return []
    config_dir = Path(parsed.config_dir) if parsed.config_dir is not None else None
    plugin = DefaultCompletionPlugin(compose.loader(config_dir))
    compose.register([] if config_dir is None else [config_dir])
    try:
        words = plugin._query("config", " ".join([*(["-m"] if parsed.multirun else []), *parsed.overrides, last]))
    except (HydraException, OmegaConfBaseException, ValueError):
        return []
    if equals:
        return [word for word in words if not word.endswith("=")]  # Hydra offers betas=0= for a list
    return [word for word in words if last.lstrip("+~").startswith("h") or not re.match(r"[+~]?hydra\b", word)]
