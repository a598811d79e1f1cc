//! Which collective a generation gets: NCCL where all members can use it, else TCP. The bits are the same.

use std::str::FromStr;

use model::device::Device;

use super::tcp::TcpCollective;
use super::{Collective, Result};

/// What a worker wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Choice {
    /// NCCL between several CUDA devices where all members can use it, else TCP.
    #[default]
    Auto,
    /// TCP, through the host's memory.
    Tcp,
    /// NCCL, also for a worker alone; to go on without is an error.
    Nccl,
}

impl FromStr for Choice {
    type Err = String;

    fn from_str(word: &str) -> std::result::Result<Self, String> {
        match word {
            "auto" => Ok(Self::Auto),
            "tcp" => Ok(Self::Tcp),
            "nccl" => Ok(Self::Nccl),
            _ => Err(format!("unknown collective '{word}', expected auto, tcp or nccl")),
        }
    }
}

/// The collective of a generation whose mesh stands, or why it is not the one that this worker insists on. Members with
/// CUDA devices talk to each other about it: all of them must come here.
///
/// # Errors
/// A peer or NCCL failed, or the generation was aborted.
pub(crate) fn choose<D: Device + 'static>(
    tcp: TcpCollective,
    device: &D,
    choice: Choice,
) -> Result<std::result::Result<Box<dyn Collective<D>>, String>> {
    #[cfg(feature = "cuda")]
    if let Some(memory) = device.cuda()
        && (tcp.ranks() > 1 || choice == Choice::Nccl)
    {
        return cuda::choose(tcp, memory.ordinal(), choice);
    }
    if choice == Choice::Nccl {
        let what =
            if device.cuda().is_some() { "this build has no NCCL" } else { "it is between CUDA devices" };
        return Ok(Err(format!("NCCL cannot be used: {what}")));
    }
    Ok(Ok(Box::new(tcp)))
}

#[cfg(feature = "cuda")]
mod cuda {
    use std::sync::OnceLock;

    use kernels::cuda::devices;
    use kernels::nccl::{Library, NcclError};
    use model::device::Device;

    use super::super::nccl::{Formed, Own, negotiate};
    use super::super::tcp::{SILENCE_LIMIT, TcpCollective};
    use super::super::{Collective, Result};
    use super::Choice;

    /// NCCL's own variable: whether ranks may share a device.
    const SHARES: &str = "NCCL_MULTI_RANK_GPU_ENABLE";

    pub(super) fn choose<D: Device + 'static>(
        tcp: TcpCollective,
        device: usize,
        choice: Choice,
    ) -> Result<std::result::Result<Box<dyn Collective<D>>, String>> {
        let own = match choice {
            Choice::Tcp => Err("it was told to use TCP".to_owned()),
            Choice::Auto | Choice::Nccl => own(device),
        };
        match negotiate::<_, D>(tcp, own, device, SILENCE_LIMIT)? {
            Formed::Nccl(nccl) => {
                tracing::info!("gradients travel over NCCL");
                Ok(Ok(Box::new(nccl)))
            }
            Formed::Tcp(_, why) if choice == Choice::Nccl => Ok(Err(format!("NCCL cannot be used: {why}"))),
            Formed::Tcp(tcp, why) => {
                tracing::warn!("gradients travel through the host's memory: {why}");
                Ok(Ok(Box::new(tcp)))
            }
        }
    }

    /// What this process brings to a communicator.
    fn own(device: usize) -> std::result::Result<Own<Library>, String> {
        static LIBRARY: OnceLock<std::result::Result<Library, NcclError>> = OnceLock::new();
        let library = LIBRARY.get_or_init(Library::load).clone().map_err(|error| error.to_string())?;
        let gpus = devices().map_err(|error| error.to_string())?;
        let gpu = gpus.get(device).ok_or_else(|| format!("there is no CUDA device {device}"))?.uuid;
        Ok(Own { library, gpu, shares: std::env::var(SHARES).is_ok_and(|value| value == "1") })
    }
}
