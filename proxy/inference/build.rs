//! Compiles the protobuf files with a compiler written in Rust, so that a build needs no protoc.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = ["proto/inference.proto", "proto/orca.proto"];
    for file in files {
        println!("cargo:rerun-if-changed={file}");
    }
    let descriptors = protox::compile(files, ["proto"])?;
    tonic_prost_build::configure()
        .emit_rerun_if_changed(false)
        // Tensors are slices of the message they came in, and maps have one order.
        .bytes(".inference")
        .btree_map(".")
        .compile_fds(descriptors)?;
    Ok(())
}
