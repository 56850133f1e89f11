//! `penstock`, the command line: a demo of the whole mesh, and questions to a running control.
//!
//! Every question goes to control's HTTP API, which asks the proxies, or to the Kubernetes API. Results go to standard output as a table,
//! JSON or YAML; progress and errors go to standard error; the exit status says how it went.

mod authz;
mod canary;
mod check;
mod cluster;
mod connection;
mod control;
mod demo;
mod endpoints;
mod failure;
mod inject;
mod install;
mod interruption;
mod output;
mod rotate;
mod routes;
mod service;
mod stat;
mod status;
mod table;
mod tap;
mod terminal;
mod units;

use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::control::Control;
use crate::failure::Failure;
use crate::output::{Format, Output};
use crate::terminal::{Terminal, Tone};

const EXIT_STATUS: &str = "\
Exit status:
  0    fine
  1    the command worked and found a problem, or could not finish
  2    the command line is wrong
  3    control does not answer
  130  interrupted by Ctrl-C or SIGTERM";

/// The service mesh for GPU inference, on the command line.
#[derive(Debug, Parser)]
#[command(name = "penstock", version, after_help = EXIT_STATUS, max_term_width = 100)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Args)]
struct Global {
    /// Where control's API listens
    #[arg(
        long,
        global = true,
        env = "PENSTOCK_CONTROL_API",
        value_name = "URL",
        default_value = "http://127.0.0.1:8080"
    )]
    control: String,
    /// How results are printed: table, json or yaml
    #[arg(
        long,
        short,
        global = true,
        value_enum,
        value_name = "FORMAT",
        hide_possible_values = true,
        default_value_t
    )]
    output: Format,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the whole mesh on this machine with real requests, and show what it does
    #[command(
        after_help = "Example:\n  penstock demo --stay        # then paste the commands that it prints"
    )]
    Demo(demo::Args),
    /// Say which proxies are connected and whether each has applied the newest configuration
    #[command(
        after_help = "Examples (with `penstock demo --stay` running):\n  penstock status\n  penstock status --wait --timeout 5s"
    )]
    Status(status::Args),
    /// Show success rate, requests a second and latency of each Service and version
    #[command(
        after_help = "Examples (with `penstock demo --stay` running):\n  penstock stat digits --window 30s\n  penstock stat --watch"
    )]
    Stat(stat::Args),
    /// Show what matches, where it goes with which share, and how many proxies hold it
    #[command(after_help = "Example (with `penstock demo --stay` running):\n  penstock routes digits")]
    Routes(routes::Args),
    /// Show the endpoints of each Service and their load, as the clients' proxies see them
    #[command(after_help = "Example (with `penstock demo --stay` running):\n  penstock endpoints digits")]
    Endpoints(endpoints::Args),
    /// Show live requests, one a line
    #[command(
        after_help = "Examples (with `penstock demo --stay` running):\n  penstock tap digits --limit 20\n  penstock tap demo/digits --direction both --output json"
    )]
    Tap(tap::Args),
    /// Show the access policies of a pod, and what would become of a request
    #[command(
        after_help = "Example (with `penstock demo --stay` running):\n  penstock authz digits-v1-a --from spiffe://cluster.local/ns/demo/sa/client --path /v2/health/ready"
    )]
    Authz(authz::Args),
    /// Show canaries, and promote, pause or abort one
    #[command(
        after_help = "Examples:\n  penstock canary list\n  penstock canary watch demo/digits && echo promoted"
    )]
    Canary(canary::Args),
    /// Print what a cluster needs, for kubectl apply
    #[command(
        after_help = "Examples:\n  penstock install --crds-only | kubectl apply -f -\n  penstock install --replicas 3 | kubectl apply -f -"
    )]
    Install(install::Args),
    /// Print what install has made, for kubectl delete, and say whose sidecars remain
    #[command(after_help = "Example:\n  penstock uninstall | kubectl delete --ignore-not-found -f -")]
    Uninstall(install::Removal),
    /// Check a cluster before or after installing, a running control, or a directory of objects
    #[command(
        after_help = "Examples:\n  penstock check --pre        # may it be installed on the cluster of the kubeconfig?\n  penstock check              # the cluster, and control where it answers\n  penstock check --source dir:manifests/examples/digits"
    )]
    Check(check::Args),
    /// Have control make another root for all identities of a cluster, with overlap: nothing restarts, no connection breaks
    #[command(
        after_help = "Examples:\n  penstock rotate-root              # and follow it to its end, which is when the last old certificate has expired\n  penstock rotate-root --no-wait"
    )]
    RotateRoot(rotate::Args),
    /// Add the sidecar to the pods in manifests, as the injector would, and print them
    ///
    /// Knows Pods, Deployments, StatefulSets, DaemonSets, ReplicaSets, Jobs, CronJobs and Lists of them; all else passes as it is.
    /// Pods that say penstock.io/inject: disabled, or have hostNetwork, stay as they are; standard error says so.
    #[command(
        after_help = "Examples:\n  penstock inject -f web.yaml | kubectl apply -f -\n  kubectl get deploy -o yaml | penstock inject -f - | kubectl apply -f -\n  penstock inject -f web.yaml | penstock uninject -f -"
    )]
    Inject(inject::Args),
    /// Take the sidecar out of the pods in manifests again, and print them
    #[command(
        after_help = "Example:\n  kubectl get deploy web -o yaml | penstock uninject -f - | kubectl apply -f -"
    )]
    Uninject(inject::Files),
    /// Become another program that ends with its parent (for the demo's own use)
    #[command(name = demo::processes::HOLD, hide = true)]
    Hold(demo::processes::HoldArgs),
}

// One thread: waiting for answers needs no more. And the kernel ties the demo's children to the thread that started
// them, which must therefore be one that lives as long as the program.
#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let cli = Cli::parse();
    let output = Output { format: cli.global.output, terminal: Terminal::of(&std::io::stdout()) };
    let code = match run(cli, output).await {
        Ok(code) => code,
        Err(failure) => {
            if !matches!(failure, Failure::ReaderGone) {
                let terminal = Terminal::of(&std::io::stderr());
                eprintln!("{} {failure}", terminal.paint(Tone::Bad, "penstock:"));
            }
            failure.exit_code()
        }
    };
    ExitCode::from(code)
}

async fn run(cli: Cli, output: Output) -> Result<u8, Failure> {
    let mut control = Control::at(&cli.global.control)?;
    match cli.command {
        Command::Demo(args) => demo::run(&args, output).await,
        Command::Status(args) => status::run(&args, &mut control, output).await,
        Command::Stat(args) => stat::run(args, &mut control, output).await,
        Command::Routes(args) => routes::run(args, &mut control, output).await,
        Command::Endpoints(args) => endpoints::run(args, &mut control, output).await,
        Command::Tap(args) => tap::run(args, &mut control, output).await,
        Command::Authz(args) => authz::run(args, &mut control, output).await,
        Command::Canary(args) => canary::run(args, &mut control, output).await,
        Command::Install(args) => install::run(&args, output),
        Command::Uninstall(args) => install::remove(&args, output).await,
        Command::Check(args) => check::run(args, &mut control, output).await,
        Command::RotateRoot(args) => rotate::run(&args, output).await,
        Command::Inject(args) => inject::run(&args, output),
        Command::Uninject(args) => inject::undo(&args, output),
        Command::Hold(args) => Err(demo::processes::hold(&args)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failure::exit;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_has_help_that_fits_a_screen_and_an_example() {
        fn fit(command: &mut clap::Command) {
            let help = command.render_long_help().to_string();
            assert!(help.contains("Example"), "{help}");
            assert!(help.lines().count() <= 30, "{help}");
            // What clap itself has added while it rendered is its own.
            command.get_subcommands_mut().filter(|command| command.get_name() != "help").for_each(fit);
        }
        Cli::command().get_subcommands_mut().filter(|command| !command.is_hide_set()).for_each(fit);
    }

    #[test]
    fn options_may_stand_on_either_side_of_the_command() {
        for line in ["penstock -o json stat digits", "penstock stat digits --output json"] {
            let cli = Cli::try_parse_from(line.split(' ')).unwrap();
            assert_eq!(cli.global.output, Format::Json, "{line}");
        }
    }

    #[test]
    fn what_makes_no_sense_is_a_usage_error() {
        for line in [
            "penstock",
            "penstock stat --window soon",
            "penstock demo --seconds 1",
            "penstock tap --direction up",
        ] {
            let error = Cli::try_parse_from(line.split(' ')).unwrap_err();
            assert_eq!(error.exit_code(), i32::from(exit::USAGE), "{line}");
        }
    }
}
