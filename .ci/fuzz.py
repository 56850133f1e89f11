"""Has libFuzzer make up inputs for the targets of fuzz/, two at a time: what `make fuzz` runs, in fuzz/, once they are built.

Prints a line for each target: how long, how many inputs, what was found. Of one that failed the whole log is shown, with the input and
how to run it again; exit status 1 if there was any. What stands behind `--` is libFuzzer's.
"""

import argparse
import concurrent.futures
import os
import pathlib
import re
import shutil
import subprocess
import sys
import threading

AT_ONCE = 2


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--cargo-fuzz", required=True, help="the program")
    parser.add_argument("--target-dir", required=True, type=pathlib.Path, help="where it was built, and where logs go")
    parser.add_argument("--corpus", required=True, help="a folder to begin with and to keep inputs in, one below it for each target; none: the seeds alone, and the same inputs each time")
    parser.add_argument("--seconds", required=True, type=int, help="for each target")
    parser.add_argument("--others", type=int, help="for each that is none of --long, if not as long")
    parser.add_argument("--long", default="", help="names of targets")
    parser.add_argument("--features", help="of the crate")
    parser.add_argument("targets", nargs="+")
    arguments = sys.argv[1:]
    behind = arguments.index("--") if "--" in arguments else len(arguments)
    options = parser.parse_args(arguments[:behind])
    limits = arguments[behind + 1:]

    logs = options.target_dir / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    longest = max(map(len, options.targets))
    print_one_by_one = threading.Lock()

    def run(target):
        long = target in options.long.split() or options.others is None
        seconds = options.seconds if long else options.others
        gate = options.corpus == "none"
        corpus = (options.target_dir / "corpus-of-the-gate" if gate else pathlib.Path(options.corpus)) / target
        if gate:
            shutil.rmtree(corpus, ignore_errors=True)
        corpus.mkdir(parents=True, exist_ok=True)
        command = [options.cargo_fuzz, "run", "-s", "none", "--target-dir", options.target_dir, target, corpus, f"seeds/{target}"]
        if options.features:
            command[2:2] = ["--features", options.features]
        command += ["--", f"-max_total_time={seconds}", "-print_final_stats=1", "-verbosity=0", *limits]
        if gate:
            command.append("-seed=1")
        log = logs / target
        with open(log, "wb") as file:
            status = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT).returncode
        said = log.read_text(errors="replace")
        executions = re.findall(r"stat::number_of_executed_units: *(\d+)", said)
        inputs = f"{int(executions[-1]):,}" if executions else "?"
        found = "nothing found" if status == 0 else f"FOUND SOMETHING (exit status {status}); the log:"
        with print_one_by_one:
            print(f"{target:<{longest}}  {seconds:>5} s  {inputs:>12} inputs  {found}", flush=True)
            if status != 0:
                print(said, flush=True)
        return status == 0

    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        # Those that take long first, so that no core waits for one of them at the end.
        order = sorted(options.targets, key=lambda target: target not in options.long.split())
        fine = list(pool.map(run, order))
    return 0 if all(fine) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        os._exit(130)
