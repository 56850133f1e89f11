//! Compiles the protobuf files with a compiler written in Rust, so that a build needs no protoc.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let messages = ["proto/inference.proto", "proto/orca.proto"];
    let services = ["proto/orca_service.proto"];
    for file in messages.iter().chain(&services) {
        println!("cargo:rerun-if-changed={file}");
    }
    tonic_prost_build::configure()
        .emit_rerun_if_changed(false)
        // Tensors are slices of the message they came in, and maps have one order.
        .bytes(".inference")
        .btree_map(".")
        .compile_fds(protox::compile(messages, ["proto"])?)?;
    tonic_prost_build::configure()
        .emit_rerun_if_changed(false)
        .extern_path(".xds.data.orca.v3", "crate::orca::pb")
        .compile_fds(protox::compile(services, ["proto"])?)?;
    Ok(())
}
