// Sets the chosen theme before anything is painted; without a choice the system's own is followed.
document.documentElement.dataset.theme = localStorage.getItem("graft-theme") ?? "auto";
