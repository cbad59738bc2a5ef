"""What can go wrong when the plugin is put on a node, by which part of the pass it was."""

from __future__ import annotations

from ztunnel.errors import ConfigError, ZtunnelError


class InstallError(ZtunnelError):
    """Foreseen; the node is not ready for pods of the mesh yet, and the pass is tried again."""

    reason = "install"


class BundleError(InstallError):
    """The plugin and its interpreter cannot be laid down."""

    reason = "copy_binaries"


class ElfError(BundleError):
    """A program or library is not of the kind that we know how to move."""

    reason = "elf"


class KubeconfigError(InstallError):
    """The credentials for a plugin that asks Kubernetes cannot be written."""

    reason = "kubeconfig"


class ConflistError(InstallError):
    """The runtime's configuration cannot be read or written, or is not what it must be."""

    reason = "cni_config"


class InstallConfigError(ConfigError):
    """Startup only; the settings contradict each other."""
