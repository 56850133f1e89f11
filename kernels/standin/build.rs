//! Compiles the kernels for the CPU, with any C compiler.

fn main() {
    println!("cargo::rerun-if-changed=../cuda");
    println!("cargo::rerun-if-changed=src/host.c");
    cc::Build::new()
        .file("src/host.c")
        .include("../cuda")
        .std("c11")
        // A product is rounded before it is added: the bits of a GPU that is told the same.
        .flag("-ffp-contract=off")
        // Tests run it on photographs; without optimisation they would wait for it.
        .opt_level(2)
        .warnings_into_errors(true)
        .compile("penstock_standin_kernels");
}
